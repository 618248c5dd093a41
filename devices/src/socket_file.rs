//! A Unix socket that listens at a path, and whose file goes with it.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// A listening socket that does not block.
#[derive(Debug)]
pub(crate) struct SocketFile {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file.
    file: Option<(u64, u64)>,
}

impl SocketFile {
    /// Listens at `path`, where nothing may be yet (`AddrInUse`).
    pub(crate) fn listen(path: &Path) -> io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        let socket = Self {
            listener,
            path: path.into(),
            file: identity(path),
        };
        socket.listener.set_nonblocking(true)?;
        Ok(socket)
    }

    /// Where it listens.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The next client that has connected.
    pub(crate) fn accept(&self) -> io::Result<UnixStream> {
        let (socket, _) = self.listener.accept()?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    }
}

impl AsRawFd for SocketFile {
    fn as_raw_fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // What somebody has put there since is theirs.
        if self.file.is_some() && identity(&self.path) == self.file {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let data = std::fs::symlink_metadata(path).ok()?;
    Some((data.dev(), data.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_goes_with_the_socket_and_another_one_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let socket = SocketFile::listen(&path).unwrap();
        assert_eq!(socket.path(), path);
        assert_eq!(
            SocketFile::listen(&path).unwrap_err().kind(),
            io::ErrorKind::AddrInUse
        );
        assert_eq!(
            socket.accept().unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
        drop(socket);
        assert!(!path.exists());
        let socket = SocketFile::listen(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "another's").unwrap();
        drop(socket);
        assert!(path.exists());
    }
}
