//! What this machine's KVM can do.

use std::fs;
use std::path::Path;

/// What is behind `/dev/kvm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostKvm {
    /// The processor's virtualisation: any guest runs, at full speed.
    Hardware,
    /// Something else, that runs or emulates some guests only: Linux needs the nested machine.
    Emulated,
    /// There is no `/dev/kvm`, or we may not use it.
    None,
}

/// Returns what this machine's KVM can do.
pub fn host_kvm() -> HostKvm {
    let opens = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok();
    let cpu_info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let has_module = ["kvm_intel", "kvm_amd"]
        .iter()
        .any(|module| Path::new("/sys/module").join(module).exists());
    judge(opens, &cpu_info, has_module)
}

fn judge(opens: bool, cpu_info: &str, has_module: bool) -> HostKvm {
    let has_flag = cpu_info
        .lines()
        .filter(|line| line.starts_with("flags"))
        .any(|line| {
            line.split_whitespace()
                .any(|flag| flag == "vmx" || flag == "svm")
        });
    match (opens, has_flag && has_module) {
        (false, _) => HostKvm::None,
        (true, true) => HostKvm::Hardware,
        (true, false) => HostKvm::Emulated,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_takes_the_device_the_flag_and_the_module() {
        let with = "processor : 0\nflags\t\t: fpu svm sse\n";
        let without = "model name : svm vmx\nflags\t\t: fpu svm_lock sse\n";
        assert_eq!(judge(true, with, true), HostKvm::Hardware);
        assert_eq!(judge(true, with, false), HostKvm::Emulated);
        assert_eq!(judge(true, without, true), HostKvm::Emulated);
        assert_eq!(judge(false, with, true), HostKvm::None);
    }
}
