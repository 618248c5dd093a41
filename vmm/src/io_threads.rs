//! Which threads work on the queues of the machine's virtio devices.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use kiln_io_thread::{CpuList, HandlerPanic, IoHandle, IoThread, IoThreadSet};
use serde::{Deserialize, Serialize};

use crate::machine::DeviceFailure;
use crate::{BuildError, names};

/// Who works on the queues of virtio devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum IoThreads {
    /// The machine's one I/O thread, which also serves the serial port.
    #[default]
    Shared,
    /// A thread for each device.
    Device,
    /// A thread for each queue of a disk, and for each pair of queues (receive and transmit) of a
    /// network interface. The other devices have one each.
    Queue,
}

impl fmt::Display for IoThreads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Shared => "shared",
            Self::Device => "device",
            Self::Queue => "queue",
        })
    }
}

/// Not one of the ways to have I/O threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there are `shared`, `device` and `queue`")]
pub struct UnknownIoThreads;

impl FromStr for IoThreads {
    type Err = UnknownIoThreads;

    /// Reads the name that the command line and a configuration have for it.
    ///
    /// ```
    /// use kiln_vmm::IoThreads;
    ///
    /// assert_eq!("device".parse(), Ok(IoThreads::Device));
    /// assert_eq!(IoThreads::default().to_string(), "shared");
    /// ```
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "shared" => Ok(Self::Shared),
            "device" => Ok(Self::Device),
            "queue" => Ok(Self::Queue),
            _ => Err(UnknownIoThreads),
        }
    }
}

/// What a device says of its threads.
#[derive(Clone, Debug, Default)]
pub(crate) struct DeviceIo {
    /// Where it is not as for the machine.
    pub(crate) threads: Option<IoThreads>,
    /// Where they are not the CPUs of the machine's I/O threads.
    pub(crate) affinity: Option<CpuList>,
}

/// The queues of a device, as far as threads are concerned.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueueGroups {
    /// How many parts of the device can each have a thread.
    pub(crate) count: usize,
    /// How many queues, with indices in a row, make a part.
    pub(crate) queues: usize,
}

impl QueueGroups {
    /// A device that is worked on by one thread.
    pub(crate) const ONE: Self = Self {
        count: 1,
        queues: 1,
    };
}

/// The I/O threads of a machine. Dropping it joins them.
pub(crate) struct IoPool {
    // The first to end: they are what devices work on.
    own: Vec<IoThread>,
    shared: IoHandle,
    /// The thread behind it, unless that is the program's own.
    _shared_thread: Option<IoThread>,
    /// The machine's name.
    name: Option<String>,
    default: IoThreads,
    affinity: Option<CpuList>,
    failure: Arc<DeviceFailure>,
}

impl IoPool {
    /// Starts the machine's one thread, and does not wait for it; none where there is a loop of the
    /// program's own.
    pub(crate) fn start(
        name: Option<String>,
        default: IoThreads,
        affinity: Option<CpuList>,
        io_loop: Option<&IoHandle>,
        failure: Arc<DeviceFailure>,
    ) -> Result<Self, BuildError> {
        if let Some(cpus) = &affinity {
            check(cpus)?;
        }
        let (shared, thread) = match io_loop {
            Some(own) => (own.telling(on_panic(&failure)), None),
            None => {
                let thread = spawn(name.as_deref(), "io", affinity.clone(), &failure)?;
                (thread.handle().clone(), Some(thread))
            }
        };
        Ok(Self {
            own: Vec::new(),
            shared,
            _shared_thread: thread,
            name,
            default,
            affinity,
            failure,
        })
    }

    /// The threads for a device: new ones, if it is to have its own. `device` is its name in
    /// messages, `role` that in the names of threads.
    pub(crate) fn threads_for(
        &mut self,
        device: &str,
        role: &str,
        io: &DeviceIo,
        groups: QueueGroups,
    ) -> Result<IoThreadSet, BuildError> {
        let threads = match io.threads.unwrap_or(self.default) {
            IoThreads::Shared if io.affinity.is_some() => {
                let device = device.to_owned();
                return Err(BuildError::SharedIoAffinity { device });
            }
            IoThreads::Shared => return Ok(self.shared.clone().into()),
            IoThreads::Device => 1,
            IoThreads::Queue => groups.count.max(1),
        };
        if let Some(cpus) = &io.affinity {
            check(cpus)?;
        }
        let affinity = io.affinity.as_ref().or(self.affinity.as_ref());
        let mut handles = Vec::with_capacity(threads);
        for number in 0..threads {
            let role = match threads {
                1 => role.to_owned(),
                _ => format!("{role}.{number}"),
            };
            let thread = spawn(
                self.name.as_deref(),
                &role,
                affinity.cloned(),
                &self.failure,
            )?;
            handles.push(thread.handle().clone());
            self.own.push(thread);
        }
        // The queues take turns, so each thread is there once for every queue of its part.
        let mut handles = handles
            .into_iter()
            .flat_map(|handle| std::iter::repeat_n(handle, groups.queues.max(1)));
        let first = handles.next().unwrap_or_else(|| self.shared.clone());
        Ok(IoThreadSet::new(first, handles))
    }

    /// Waits until all of them can be called, so that one that can't have what it needs is found
    /// while the machine is built.
    pub(crate) fn wait_started(&self) -> Result<(), BuildError> {
        for handle in self.handles() {
            handle.wait_started()?;
        }
        Ok(())
    }

    /// The thread that all devices share which have none of their own.
    pub(crate) fn shared(&self) -> &IoHandle {
        &self.shared
    }

    /// All of them.
    pub(crate) fn handles(&self) -> impl Iterator<Item = &IoHandle> {
        let own = self.own.iter().map(IoThread::handle);
        std::iter::once(&self.shared).chain(own)
    }
}

fn spawn(
    machine: Option<&str>,
    role: &str,
    cpus: Option<CpuList>,
    failure: &Arc<DeviceFailure>,
) -> Result<IoThread, BuildError> {
    let name = names::thread(machine, role, 0);
    Ok(IoThread::spawn_on(&name, cpus, on_panic(failure))?)
}

fn on_panic(failure: &Arc<DeviceFailure>) -> impl Fn(HandlerPanic) + Send + Sync + 'static {
    let reported = Arc::clone(failure);
    move |panic| reported.report(panic.to_string())
}

/// Refuses CPUs that are not online: Linux would leave them out without a word.
fn check(cpus: &CpuList) -> Result<(), BuildError> {
    let online = CpuList::online().map_err(|source| BuildError::OnlineCpus { source })?;
    match cpus.without(&online) {
        None => Ok(()),
        Some(missing) => Err(BuildError::IoAffinity {
            cpus: cpus.clone(),
            missing,
            online,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(default: IoThreads) -> IoPool {
        IoPool::start(None, default, None, None, Arc::default()).unwrap()
    }

    fn io(threads: Option<IoThreads>) -> DeviceIo {
        DeviceIo {
            threads,
            affinity: None,
        }
    }

    const PAIRS: QueueGroups = QueueGroups {
        count: 2,
        queues: 2,
    };

    #[test]
    fn a_shared_thread_is_all_that_there_is_unless_asked_for_more() {
        let mut pool = pool(IoThreads::Shared);
        let set = pool.threads_for("net 0", "net0", &io(None), PAIRS).unwrap();
        assert_eq!((set.len(), set.get(0)), (1, pool.shared()));
        assert_eq!(pool.handles().count(), 1);
        pool.wait_started().unwrap();
    }

    #[test]
    fn a_device_has_as_many_threads_as_it_asks_for() {
        let mut pool = pool(IoThreads::Queue);
        let set = pool
            .threads_for("disk 0", "disk0", &io(Some(IoThreads::Device)), PAIRS)
            .unwrap();
        assert!(set.get(0) == set.get(set.thread_of(1)) && set.get(0) != pool.shared());
        let set = pool.threads_for("net 0", "net0", &io(None), PAIRS).unwrap();
        let thread = |queue| set.get(set.thread_of(queue)).clone();
        assert!(thread(0) == thread(1) && thread(2) == thread(3));
        assert!(thread(0) != thread(2));
        // The control queue is with the first pair.
        assert!(thread(4) == thread(0));
        let set = pool
            .threads_for("rng", "rng", &io(None), QueueGroups::ONE)
            .unwrap();
        assert_eq!(set.len(), 1);
        let set = pool
            .threads_for("vsock", "vsock", &io(Some(IoThreads::Shared)), PAIRS)
            .unwrap();
        assert_eq!(set.get(0), pool.shared());
        assert_eq!(pool.handles().count(), 5);
        pool.wait_started().unwrap();
    }

    #[test]
    fn cpus_that_are_not_there_are_named() {
        let cpus: CpuList = "0,1023".parse().unwrap();
        let started = IoPool::start(None, IoThreads::Shared, Some(cpus), None, Arc::default());
        let error = started.map(|_| ()).unwrap_err().to_string();
        assert!(
            error.starts_with("run I/O threads on CPUs 0,1023: 1023 not online"),
            "{error}"
        );
    }

    #[test]
    fn a_device_on_the_shared_thread_has_no_cpus_of_its_own() {
        let mut pool = pool(IoThreads::Shared);
        let mut io = DeviceIo {
            threads: None,
            affinity: Some("0".parse().unwrap()),
        };
        let refused = pool.threads_for("disk 0", "disk0", &io, QueueGroups::ONE);
        let error = refused.unwrap_err().to_string();
        assert!(
            error.contains("`disk 0`") && error.contains("shared"),
            "{error}"
        );
        io.threads = Some(IoThreads::Device);
        pool.threads_for("disk 0", "disk0", &io, QueueGroups::ONE)
            .unwrap();
        pool.wait_started().unwrap();
    }
}
