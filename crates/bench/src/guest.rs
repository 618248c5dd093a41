//! Guests of a few bytes, as ELF images that are entered by PVH: 32-bit protected mode, flat.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// Where the image is loaded and entered.
const LOAD_ADDRESS: u64 = 0x10_0000;
const PAGE: usize = 0x1000;

/// `mov dx, 0x3f8; mov al, 'X'; out dx, al`
const PRINT: [u8; 7] = [0x66, 0xba, 0xf8, 0x03, 0xb0, b'X', 0xee];
/// `mov dx, 0x600; mov al, 0x34; out dx, al`: ACPI's power-off; QEMU is given a device there.
const POWER_OFF: [u8; 7] = [0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee];
/// `cli; hlt`, for ever.
const HALT: [u8; 4] = [0xfa, 0xf4, 0xeb, 0xfc];

/// What a loop of exits does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Exit {
    /// A byte to a port that nothing is at.
    Port,
    /// Four bytes to an address that nothing is at.
    Mmio,
    /// A byte to the serial port.
    Serial,
}

/// Prints `X`, and powers off.
pub(crate) fn tiny() -> Vec<u8> {
    [&PRINT[..], &POWER_OFF, &HALT].concat()
}

/// Prints `X`, and halts.
pub(crate) fn halted() -> Vec<u8> {
    [&PRINT[..], &HALT].concat()
}

/// Makes that many exits, prints `X`, and powers off.
pub(crate) fn exits(kind: Exit, count: u32) -> Vec<u8> {
    let port = match kind {
        Exit::Port => 0x9ff0u16,
        Exit::Serial => 0x3f8,
        Exit::Mmio => 0,
    };
    let mut code = vec![0x66, 0xba]; // mov dx, port
    code.extend(port.to_le_bytes());
    code.push(0xbb); // mov ebx, address
    code.extend(0xdff0_0000u32.to_le_bytes());
    code.push(0xb9); // mov ecx, count + 1
    code.extend((count + 1).to_le_bytes());
    code.extend([0xb0, b'.', 0xeb]); // mov al, '.'; jmp to the check
    let body: &[u8] = match kind {
        Exit::Mmio => &[0x89, 0x03],                // mov [ebx], eax
        Exit::Port | Exit::Serial => &[0xee, 0x90], // out dx, al; nop
    };
    code.push(body.len() as u8);
    code.extend(body);
    code.extend([0x49, 0x75, 0xfb]); // check: dec ecx; jnz to the body
    [&code[..], &PRINT, &POWER_OFF, &HALT].concat()
}

/// Writes a guest as an image into a folder. It is filled up to `size` bytes, as a kernel of that
/// size would be.
pub(crate) fn write(folder: &Path, name: &str, code: &[u8], size: usize) -> Result<PathBuf> {
    let path = folder.join(name);
    std::fs::write(&path, image(code, size)).with_context(|| format!("write {name}"))?;
    Ok(path)
}

/// An ELF image with one segment to load, and the note that names its PVH entry.
fn image(code: &[u8], size: usize) -> Vec<u8> {
    let segment = code.len().max(size);
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    image.extend(2u16.to_le_bytes()); // ET_EXEC
    image.extend(62u16.to_le_bytes()); // EM_X86_64
    image.extend(1u32.to_le_bytes()); // EV_CURRENT
    image.extend(LOAD_ADDRESS.to_le_bytes()); // entry
    image.extend(64u64.to_le_bytes()); // program headers
    image.extend([0; 12]); // section headers, flags
    for half in [64u16, 56, 2, 0, 0, 0] {
        image.extend(half.to_le_bytes());
    }
    let note = 64 + 2 * 56;
    let mut header = |kind: u32, offset: usize, address: u64, size: usize, align: u64| {
        image.extend(kind.to_le_bytes());
        image.extend(5u32.to_le_bytes()); // readable and executable
        for field in [
            offset as u64,
            address,
            address,
            size as u64,
            size as u64,
            align,
        ] {
            image.extend(field.to_le_bytes());
        }
    };
    header(1, PAGE, LOAD_ADDRESS, segment, PAGE as u64); // PT_LOAD
    header(4, note, 0, 20, 4); // PT_NOTE
    for word in [4u32, 4, 18] {
        image.extend(word.to_le_bytes()); // lengths of name and content, XEN_ELFNOTE_PHYS32_ENTRY
    }
    image.extend(b"Xen\0");
    image.extend((LOAD_ADDRESS as u32).to_le_bytes());
    image.resize(PAGE, 0);
    image.extend(code);
    // Not zeros: nothing on the way may find the content out.
    image.extend(
        (code.len()..segment).map(|at| (at as u32).wrapping_mul(0x9e37_79b1).to_be_bytes()[0]),
    );
    image
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_has_its_code_where_its_header_says() {
        let code = tiny();
        let image = image(&code, 10_000);
        assert_eq!(image.len(), PAGE + 10_000);
        assert_eq!(image[PAGE..PAGE + code.len()], code);
        assert_eq!(image[64 + 8..64 + 16], (PAGE as u64).to_le_bytes());
    }

    #[test]
    fn a_loop_of_exits_jumps_where_it_should() {
        for kind in [Exit::Port, Exit::Mmio, Exit::Serial] {
            let code = exits(kind, 7);
            // The jump over the body leads to `dec ecx`, and the jump back to the body.
            let jump = code.iter().position(|byte| *byte == 0xeb).unwrap();
            let body = jump + 2;
            let check = body + usize::from(code[jump + 1]);
            assert_eq!(code[check..check + 2], [0x49, 0x75]);
            assert_eq!(check + 3 - (256 - usize::from(code[check + 2])), body);
        }
    }
}
