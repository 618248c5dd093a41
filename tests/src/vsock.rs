//! Linux guests with a socket device, and programs of theirs to talk to.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use kiln_vmm::Transport;

use crate::linux::{Linux, PATIENCE};
use crate::program::{Outcome, Program};

/// The port where a program of the guest sends everything back.
pub const ECHO: u32 = 5000;
/// The port where a program of the guest does what it is told.
const SHELL: u32 = 5001;
/// The guest's context id.
pub const CID: u32 = 42;

const SCRIPT: &str = r#"
    mkdir -p /tools && mount -t ext4 -o ro /dev/vda /tools
    cat >/bin/vsock <<'END'
#!/bin/sh
exec /tools/ld-linux-x86-64.so.2 --library-path /tools /tools/perl /tools/vsock.pl "$@"
END
    chmod +x /bin/vsock
    ulimit -n 4096
    vsock listen 5000 dd bs=64k 2>/dev/null &
    echo $! >/tmp/echo.pid
    vsock listen 5001 sh &
    echo cid=$(vsock cid)
    until grep -q end /tmp/end 2>/dev/null; do sleep 0.1; done
    dmesg | grep -E 'BUG:|Oops|rcu.*stall'; true
"#;

/// A running guest with a socket device.
pub struct VsockGuest {
    program: Program,
    socket: PathBuf,
    // Last, so that the files stay while the guest runs.
    _linux: Linux,
}

impl VsockGuest {
    /// Starts a guest and waits until its programs listen.
    ///
    /// # Errors
    ///
    /// When a file cannot be made, or the guest does not come up.
    pub fn start(series: &str, transport: Transport) -> io::Result<Self> {
        let linux = Linux::new(series, transport);
        let folder = linux.folder.path();
        let tools = tools(folder)?;
        let socket = folder.join("vsock");
        let linux = linux
            .disk(&tools, ",readonly")
            .arg("--vsock")
            .arg(format!("cid={CID},socket={}", socket.display()));
        let program = linux.start(SCRIPT)?;
        let guest = Self {
            program,
            socket,
            _linux: linux,
        };
        let since = Instant::now();
        // A program that listens is there as soon as the other one is.
        while guest.tell("true").is_err() || guest.connect(ECHO).is_err() {
            if since.elapsed() > PATIENCE {
                return Err(io::ErrorKind::TimedOut.into());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(guest)
    }

    /// The path of the socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The file descriptors of the machine's process.
    ///
    /// # Errors
    ///
    /// When the process has gone.
    pub fn descriptors(&self) -> io::Result<usize> {
        Ok(std::fs::read_dir(format!("/proc/{}/fd", self.program.id()))?.count())
    }

    /// A socket, with patience for its answers, that is connected to a port of the guest.
    ///
    /// # Errors
    ///
    /// `ConnectionRefused` where nothing listens there.
    pub fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut socket = UnixStream::connect(&self.socket)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        writeln!(socket, "CONNECT {port}")?;
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            let mut byte = [0];
            match socket.read(&mut byte) {
                Ok(1) => line.push(byte[0]),
                Ok(_) => return Err(io::ErrorKind::ConnectionRefused.into()),
                Err(error) => return Err(error),
            }
        }
        if line.starts_with(b"OK ") {
            Ok(socket)
        } else {
            Err(io::Error::other(format!("answered {line:?}")))
        }
    }

    /// A listener for a port of the host.
    ///
    /// # Errors
    ///
    /// When there is one already.
    pub fn listen(&self, port: u32) -> io::Result<UnixListener> {
        let mut path = self.socket.clone().into_os_string();
        path.push(format!("_{port}"));
        UnixListener::bind(path)
    }

    /// Has a shell of the guest run a command, and waits for its end; gives what it printed.
    ///
    /// # Errors
    ///
    /// When the shell cannot be reached, or goes before the command ends.
    pub fn tell(&self, command: &str) -> io::Result<String> {
        const END: &str = "the end of it";
        let mut socket = self.connect(SHELL)?;
        writeln!(socket, "{command}\necho {END}")?;
        let mut printed = String::new();
        for line in BufReader::new(socket).lines() {
            let line = line?;
            if line == END {
                return Ok(printed);
            }
            printed.push_str(&line);
            printed.push('\n');
        }
        Err(io::ErrorKind::UnexpectedEof.into())
    }

    /// Kills the program of the guest that listens for connections to echo, and waits until it has
    /// gone.
    ///
    /// # Errors
    ///
    /// As for [`tell`](Self::tell).
    pub fn kill_echo(&self) -> io::Result<()> {
        let kill =
            "pid=$(cat /tmp/echo.pid); kill -9 $pid; while [ -d /proc/$pid ]; do sleep 0.1; done";
        self.tell(kill).map(drop)
    }

    /// Ends the guest, and waits for its end.
    ///
    /// # Errors
    ///
    /// When it cannot be reached any more.
    pub fn end(self) -> io::Result<Outcome> {
        self.tell("echo end >/tmp/end")?;
        self.program.wait(PATIENCE)
    }
}

/// A disk with perl and a script for it, since busybox does not know these sockets.
fn tools(folder: &Path) -> io::Result<PathBuf> {
    const LOADER: &str = "/lib64/ld-linux-x86-64.so.2";
    let tree = folder.join("tools");
    std::fs::create_dir(&tree)?;
    std::fs::copy("/usr/bin/perl", tree.join("perl"))?;
    std::fs::copy(LOADER, tree.join("ld-linux-x86-64.so.2"))?;
    let script = include_str!("../../resources/guest/vsock.pl");
    std::fs::write(tree.join("vsock.pl"), script)?;
    let listed = Command::new(LOADER)
        .args(["--list", "/usr/bin/perl"])
        .output()?;
    for line in String::from_utf8_lossy(&listed.stdout).lines() {
        let path = line.split_whitespace().nth(2).map(Path::new);
        if let Some((path, name)) = path.and_then(|path| Some((path, path.file_name()?))) {
            std::fs::copy(path, tree.join(name))?;
        }
    }
    let image = folder.join("tools.ext4");
    std::fs::File::create(&image)?.set_len(32 << 20)?;
    let made = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-d"])
        .args([&tree, &image])
        .status()?;
    if made.success() {
        Ok(image)
    } else {
        Err(io::Error::other("mkfs.ext4 failed"))
    }
}
