//! `kiln check`: can this host run guests, and if not, why.

use std::fs::OpenOptions;

use anyhow::Error;
use kiln_vmm::{Execution, Host};

pub(crate) fn check() -> Result<u8, Error> {
    let host = match Host::open() {
        Ok(host) => host,
        Err(error) => {
            let error = Error::new(error);
            row("KVM", &format!("no: {error:#}"));
            return Ok(crate::FAILED);
        }
    };
    row("KVM", "ok: /dev/kvm opens and has all that Kiln needs");
    let execution = host.execution()?;
    row(
        "guest code",
        match execution {
            Execution::Hardware => "ok: run by the processor",
            Execution::Emulated => {
                "no: this KVM only emulates instructions; tiny guests run, a stock Linux kernel \
                 does not"
            }
        },
    );
    row("vCPUs", &format!("up to {} a machine", host.max_vcpus()));
    row("tap", &tap());
    match execution {
        Execution::Hardware => {
            println!("This host runs Linux guests.");
            Ok(crate::SUCCESS)
        }
        Execution::Emulated => {
            println!("This host does not run Linux guests.");
            Ok(crate::FAILED)
        }
    }
}

fn tap() -> String {
    // A guest without a network needs none: this line has no say in the exit code.
    match OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
    {
        Ok(_) => "ok: /dev/net/tun opens; a tap interface is made with `ip tuntap add`".to_owned(),
        Err(error) => format!("no: /dev/net/tun: {error}; `--net tap=…` will not work"),
    }
}

fn row(what: &str, answer: &str) {
    println!("{what:<11} {answer}");
}
