//! Who reads and writes: the I/O thread itself, or a ring that it gives requests to.

use std::fmt;
use std::io;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::BlockError;
use super::raw::RawFile;
use super::ring::Ring;
use super::shared::Source;

/// How an image or a block device is read and written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum IoEngine {
    /// What need not wait for a device is done at once, the rest by io_uring; where the host has no
    /// io_uring, all of it as by `Sync`.
    #[default]
    Auto,
    /// All of it by io_uring.
    IoUring,
    /// One request behind the other, each waited for.
    Sync,
}

impl FromStr for IoEngine {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "io_uring" => Ok(Self::IoUring),
            "sync" => Ok(Self::Sync),
            _ => Err("there are `auto`, `io_uring` and `sync`"),
        }
    }
}

/// The engine of a queue.
pub(super) struct Engine {
    chosen: IoEngine,
    /// Where there is none for the lack of it, there is none at all.
    file: Option<RawFile>,
    ring: Option<Box<Ring>>,
}

/// A ring, and the file that it is for.
pub(super) struct Ringed<'a> {
    pub(super) ring: &'a mut Ring,
    pub(super) file: &'a RawFile,
}

impl Engine {
    /// Engines for so many queues of a disk.
    ///
    /// # Errors
    ///
    /// [`BlockError::Engine`] where the one that was asked for cannot be.
    pub(super) fn for_queues(
        chosen: IoEngine,
        source: &Source,
        queues: u16,
    ) -> Result<Vec<Self>, BlockError> {
        let (file, first) = Self::choose(chosen, source)?;
        let mut ring = first.map(Box::new);
        Ok((0..queues)
            .map(|_| Self {
                chosen,
                file: file.clone(),
                ring: ring.take(),
            })
            .collect())
    }

    /// Tries what was asked for; the ring that was made for it is the first queue's.
    fn choose(
        chosen: IoEngine,
        source: &Source,
    ) -> Result<(Option<RawFile>, Option<Ring>), BlockError> {
        let Source::Raw(file) = source else {
            return match chosen {
                IoEngine::IoUring => Err(BlockError::Engine {
                    source: io::Error::other("it is for raw images and block devices"),
                }),
                _ => Ok((None, None)),
            };
        };
        let path = file.path().display();
        if chosen == IoEngine::Sync {
            tracing::info!("disk `{path}`: synchronous, as asked");
            return Ok((None, None));
        }
        if chosen == IoEngine::Auto && file.is_in_memory() {
            tracing::info!("disk `{path}`: synchronous, as it is in memory");
            return Ok((None, None));
        }
        match (Ring::new(file), chosen) {
            (Ok(ring), _) => {
                tracing::info!("disk `{path}`: io_uring");
                Ok((Some(file.clone()), Some(ring)))
            }
            (Err(source), IoEngine::IoUring) => Err(BlockError::Engine { source }),
            (Err(error), _) => {
                tracing::info!("disk `{path}`: synchronous, as there is no io_uring: {error}");
                Ok((None, None))
            }
        }
    }

    /// Whether requests can be given to a ring.
    pub(super) fn has_ring(&self) -> bool {
        self.file.is_some()
    }

    /// Whether they are to be given to a ring even where they need not wait.
    pub(super) fn is_always(&self) -> bool {
        self.chosen == IoEngine::IoUring
    }

    /// The ring, where there is one already.
    pub(super) fn existing(&mut self) -> Option<Ringed<'_>> {
        Some(Ringed {
            ring: self.ring.as_mut()?,
            file: self.file.as_ref()?,
        })
    }

    /// The ring, made where there is none yet, and then shown to `register`. `None` where it cannot
    /// be had; then there is no ring from now on.
    ///
    /// # Errors
    ///
    /// As `register`.
    pub(super) fn ring(
        &mut self,
        register: impl FnOnce(&Ring) -> io::Result<()>,
    ) -> io::Result<Option<Ringed<'_>>> {
        if self.ring.is_none() {
            let made = self.file.as_ref().map(Ring::new);
            match made {
                Some(Ok(ring)) => {
                    register(&ring)?;
                    self.ring = Some(Box::new(ring));
                }
                Some(Err(error)) => {
                    tracing::warn!("a queue of a disk goes without io_uring: {error}");
                    self.file = None;
                }
                None => {}
            }
        }
        Ok(self.existing())
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine")
            .field("chosen", &self.chosen)
            .field("ring", &self.ring)
            .finish_non_exhaustive()
    }
}
