//! What the consoles of a machine lead to.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{VmConfig, table};
use crate::{BuildError, Console, ConsolePort, Transport, VirtioConsole};

/// Where a serial port or a console leads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum SerialConfig {
    /// The process's standard input and output.
    Stdio,
    /// Nowhere.
    Null,
    /// A file, which is created or emptied.
    File(PathBuf),
}

impl SerialConfig {
    pub(super) fn path_mut(&mut self) -> Option<&mut PathBuf> {
        match self {
            Self::File(path) => Some(path),
            Self::Stdio | Self::Null => None,
        }
    }

    /// Opens it for the serial port, or what else `user` is.
    pub(super) fn open(self, user: &'static str) -> Result<Console, BuildError> {
        let fail = |object: String| {
            move |source| BuildError::Console {
                object,
                user,
                source,
            }
        };
        match self {
            Self::Stdio => Console::stdio().map_err(fail("the standard input and output".into())),
            Self::Null => Ok(Console::null()),
            Self::File(path) => {
                Console::file(&path).map_err(fail(format!("file `{}`", path.display())))
            }
        }
    }
}

/// A virtio console: /dev/hvc0 in a Linux guest, and named ports.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct VirtioConsoleConfig {
    /// Where the console leads. Not given, it leads nowhere. The standard input and output can be
    /// those of the serial port, or of this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<SerialConfig>,
    /// The named ports, /dev/virtio-ports/NAME in a Linux guest: 15 at most.
    #[serde(
        default,
        deserialize_with = "table::list",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub ports: Vec<ConsolePortConfig>,
    /// How the guest reaches it. Not given, it is as for the machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transport: Option<Transport>,
}

/// A named port of a virtio console.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct ConsolePortConfig {
    /// The name: 1 to 64 printable ASCII characters, none of them a blank or a slash.
    #[cfg_attr(test, schemars(length(min = 1, max = 64)))]
    pub name: String,
    /// The path of the Unix socket that programs of the host connect to, one after the other, and
    /// which is made with the machine.
    pub socket: PathBuf,
}

impl VirtioConsoleConfig {
    /// Opens what it names. Sockets are made with the machine.
    ///
    /// # Errors
    ///
    /// [`BuildError::Console`] where what the console leads to cannot be opened.
    pub fn open(self) -> Result<VirtioConsole, BuildError> {
        let to = self.to.unwrap_or(SerialConfig::Null).open("the console")?;
        let console = self
            .ports
            .into_iter()
            .fold(VirtioConsole::new(to), |on, port| {
                on.port(ConsolePort::listen(port.name, port.socket))
            });
        Ok(match self.transport {
            Some(transport) => console.transport(transport),
            None => console,
        })
    }

    pub(super) fn paths_mut(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        let to = self.to.as_mut().and_then(SerialConfig::path_mut);
        to.into_iter()
            .chain(self.ports.iter_mut().map(|port| &mut port.socket))
    }
}

/// Refuses two that read the standard input: each would get a part of it.
pub(super) fn check(config: &VmConfig) -> Result<(), BuildError> {
    let console = config
        .console
        .as_ref()
        .and_then(|console| console.to.as_ref());
    if config.serial == Some(SerialConfig::Stdio) && console == Some(&SerialConfig::Stdio) {
        return Err(BuildError::StdioTwice);
    }
    Ok(())
}
