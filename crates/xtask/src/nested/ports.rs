//! The streams between the nested machine and us, and all else that can happen meanwhile.

use std::io::{self, BufRead as _, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::Sender;
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGWINCH};
use signal_hook::iterator::{Handle, Signals};

use super::machine::{Machine, TERMINAL};
use super::script::Settings;
use super::terminal::{self, RawTerminal};

/// What can happen while the nested machine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// The machine is about to run the command.
    Ready,
    /// The command ended.
    Exit(u8),
    /// The machine ended.
    ControlClosed,
    /// Nobody reads our output any more.
    OutputClosed,
    /// Our terminal has another size.
    Resized,
    /// We are asked to end.
    Signal(u8),
}

impl Event {
    /// Returns what a line on the control port says.
    fn of(line: &str) -> Option<Self> {
        let mut words = line.split_whitespace();
        match (words.next()?, words.next()) {
            ("ready", None) => Some(Self::Ready),
            ("exit", Some(status)) => status.parse().ok().map(Self::Exit),
            _ => None,
        }
    }
}

/// Sends what the machine says on its control port.
pub(super) fn watch_control(control: UnixStream, events: Sender<Event>) {
    thread::spawn(move || {
        let lines = BufReader::new(control).lines().map_while(io::Result::ok);
        let said = lines.filter_map(|line| Event::of(&line));
        for event in said.chain([Event::ControlClosed]) {
            // Nobody listens any more when the machine is being ended.
            if events.send(event).is_err() {
                break;
            }
        }
    });
}

/// Watches signals until it is dropped.
pub(super) struct Watch(Handle);

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Sends the signals that ask us to end, and those that tell of our terminal's size.
pub(super) fn watch_signals(events: Sender<Event>) -> Result<Watch> {
    let mut signals =
        Signals::new([SIGHUP, SIGINT, SIGTERM, SIGWINCH]).context("watch for signals")?;
    let handle = signals.handle();
    thread::spawn(move || {
        for signal in signals.forever() {
            let event = match signal {
                SIGWINCH => Event::Resized,
                signal => Event::Signal(u8::try_from(signal).unwrap_or(u8::MAX)),
            };
            if events.send(event).is_err() {
                break;
            }
        }
    });
    Ok(Watch(handle))
}

/// The command's input, output and errors, while it runs.
pub(super) struct Streams {
    control: UnixStream,
    copies: Vec<JoinHandle<()>>,
    terminal: Option<RawTerminal>,
}

impl Streams {
    /// Connects our own streams with those of the command.
    pub(super) fn connect(
        machine: &Machine,
        settings: &Settings,
        events: &Sender<Event>,
    ) -> Result<Self> {
        let control = machine.port("control")?;
        let mut streams = Self {
            control,
            copies: Vec::new(),
            terminal: None,
        };
        if settings.terminal {
            streams.terminal = Some(RawTerminal::enter()?);
            streams.resize();
            let port = machine.port(TERMINAL)?;
            let output = port.try_clone().context("share the terminal's port")?;
            streams.copy(output, io::stdout(), events);
            send_input(port);
            return Ok(streams);
        }
        if settings.input {
            send_input(machine.port("input")?);
        }
        streams.copy(machine.port("output")?, io::stdout(), events);
        streams.copy(machine.port("errors")?, io::stderr(), events);
        Ok(streams)
    }

    /// Tells the machine the size of our terminal.
    pub(super) fn resize(&mut self) {
        if self.terminal.is_none() {
            return;
        }
        if let Some((rows, columns)) = terminal::size() {
            // It fails only when the machine has ended, which shows in other ways.
            let _ = self
                .control
                .write_all(format!("size {rows} {columns}\n").as_bytes());
        }
    }

    /// Waits until all that the machine wrote is on our own streams. The machine must have ended.
    pub(super) fn finish(self) {
        for copy in self.copies {
            // A copy that panicked has said so.
            let _ = copy.join();
        }
    }

    fn copy(&mut self, from: UnixStream, to: impl Write + Send + 'static, events: &Sender<Event>) {
        let events = events.clone();
        self.copies.push(thread::spawn(move || {
            if copy(from, to).is_err() {
                let _ = events.send(Event::OutputClosed);
            }
        }));
    }
}

/// Copies until the end of `from`, each piece at once. Fails only when `to` does.
fn copy(mut from: impl Read, mut to: impl Write) -> io::Result<()> {
    let mut buffer = [0; 1 << 16];
    loop {
        match from.read(&mut buffer) {
            // A connection that is reset has ended too.
            Ok(0) => return Ok(()),
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return Ok(()),
            Err(_) => {}
            Ok(length) => {
                to.write_all(&buffer[..length])?;
                to.flush()?;
            }
        }
    }
}

/// Sends our input to a port until its end, on a thread that nobody waits for: a read from a
/// terminal cannot be called off.
fn send_input(port: UnixStream) {
    thread::spawn(move || {
        // When the port fails, the machine has ended.
        let _ = copy(io::stdin(), &port);
        // Only our direction: a hang-up would make QEMU forget what it has not read yet.
        let _ = port.shutdown(Shutdown::Write);
    });
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn lines_of_the_control_port_are_understood_or_skipped() {
        assert_eq!(Event::of("ready"), Some(Event::Ready));
        assert_eq!(Event::of("exit 7\r"), Some(Event::Exit(7)));
        for nonsense in ["", "exit", "exit 256", "exit x", "ready 1", "hello"] {
            assert_eq!(Event::of(nonsense), None, "{nonsense}");
        }
    }

    #[test]
    fn the_end_of_the_control_port_is_told_after_what_came_before() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (sender, receiver) = mpsc::channel();
        watch_control(ours, sender);
        theirs.write_all(b"ready\nnoise\nexit 3\n").unwrap();
        drop(theirs);
        let events: Vec<_> = receiver.iter().collect();
        assert_eq!(events, [Event::Ready, Event::Exit(3), Event::ControlClosed]);
    }

    #[test]
    fn a_copy_ends_well_when_its_source_does_and_fails_with_its_destination() {
        let mut to = Vec::new();
        copy(&b"some bytes"[..], &mut to).unwrap();
        assert_eq!(to, b"some bytes");
        assert!(copy(&b"some bytes"[..], &mut [0_u8; 4][..]).is_err());
    }
}
