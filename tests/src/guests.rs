//! Bare-metal guests of a few bytes, for [`Kernel::from_code`](kiln_vmm::Kernel::from_code).
//!
//! They are entered in 64-bit mode at 1 MiB with the first 4 GiB mapped to themselves, have no
//! interrupt table, and talk to the machine's ports as `kiln_arch::layout` has them. They keep to
//! instructions that KVM's emulator knows, so that they also run where guest code is only emulated.

/// Defines a guest as a function that gives its code.
macro_rules! guest {
    ($(#[$doc:meta])* $name:ident, $($line:literal),+ $(,)?) => {
        std::arch::global_asm!(
            concat!(".pushsection .rodata.kiln_guest_", stringify!($name), ",\"a\""),
            concat!(".globl kiln_guest_", stringify!($name)),
            concat!(".globl kiln_guest_", stringify!($name), "_end"),
            concat!("kiln_guest_", stringify!($name), ":"),
            $($line,)+
            concat!("kiln_guest_", stringify!($name), "_end:"),
            ".popsection",
        );

        $(#[$doc])*
        pub fn $name() -> &'static [u8] {
            unsafe extern "C" {
                #[link_name = concat!("kiln_guest_", stringify!($name))]
                static START: u8;
                #[link_name = concat!("kiln_guest_", stringify!($name), "_end")]
                static END: u8;
            }
            let (start, end) = (&raw const START, &raw const END);
            // SAFETY: both labels are in one section of read-only data, the second after the
            // first, with nothing between them but the guest's bytes.
            unsafe { std::slice::from_raw_parts(start, end.offset_from(start) as usize) }
        }
    };
}

guest!(
    /// Powers off (ACPI sleep control register, S5).
    power_off,
    "mov dx, 0x600",
    "mov al, 0x34",
    "out dx, al",
    "2: jmp 2b",
);

guest!(
    /// Prints `hello` and a newline on the serial port, and powers off.
    hello,
    "lea rsi, [rip + 3f]",
    "mov dx, 0x3f8",
    "mov ecx, 6",
    "2: mov al, [rsi]",
    "out dx, al",
    "inc rsi",
    "dec ecx",
    "jnz 2b",
    "mov dx, 0x600",
    "mov al, 0x34",
    "out dx, al",
    "3: .ascii \"hello\\n\"",
);

guest!(
    /// Copies the serial port's input to its output until a newline, and powers off.
    echo,
    "2: mov dx, 0x3fd",
    "in al, dx",
    "test al, 1",
    "jz 2b",
    "mov dx, 0x3f8",
    "in al, dx",
    "out dx, al",
    "cmp al, 10",
    "jne 2b",
    "mov dx, 0x600",
    "mov al, 0x34",
    "out dx, al",
);

guest!(
    /// Resets by the ACPI reset register.
    acpi_reset,
    "mov dx, 0x602",
    "mov al, 1",
    "out dx, al",
    "2: jmp 2b",
);

guest!(
    /// Resets by the keyboard controller.
    i8042_reset,
    "mov al, 0xfe",
    "out 0x64, al",
    "2: jmp 2b",
);

guest!(
    /// Says that its kernel panicked.
    panic,
    "mov dx, 0x505",
    "mov al, 1",
    "out dx, al",
    "2: jmp 2b",
);

guest!(
    /// Runs into an exception with no interrupt table.
    triple_fault,
    "ud2",
);

guest!(
    /// Uses an instruction that every processor of today has and KVM's emulator lacks; on a
    /// processor it powers off.
    not_emulated,
    "popcnt eax, eax",
    "mov dx, 0x600",
    "mov al, 0x34",
    "out dx, al",
);

guest!(
    /// Runs for ever without an exit.
    busy,
    "2: jmp 2b",
);

guest!(
    /// Sleeps for ever with interrupts off.
    halted,
    "2: cli",
    "hlt",
    "jmp 2b",
);

guest!(
    /// Writes to a port that has no device, for ever.
    exit_storm,
    "2: out 0xf0, al",
    "jmp 2b",
);

guest!(
    /// Prints for ever, as fast as it can.
    chatter,
    "mov dx, 0x3f8",
    "mov al, 'x'",
    "2: out dx, al",
    "jmp 2b",
);

guest!(
    /// Writes 0xbeef to port 0xb0, and powers off.
    write_port,
    "mov ax, 0xbeef",
    "out 0xb0, ax",
    "mov dx, 0x600",
    "mov al, 0x34",
    "out dx, al",
);

guest!(
    /// Reads 4 bytes of MMIO at 0xe0000000, adds one, writes them back, and powers off.
    mmio_increment,
    "mov ebx, 0xe0000000",
    "mov eax, [rbx]",
    "inc eax",
    "mov [rbx], eax",
    "mov dx, 0x600",
    "mov al, 0x34",
    "out dx, al",
);

guest!(
    /// Prints the magic value of the first virtio-mmio device on the serial port, and powers off.
    virtio_magic,
    "mov ebx, 0xd0000000",
    "mov eax, [rbx]",
    "mov ecx, 4",
    "mov dx, 0x3f8",
    "2: out dx, al",
    "shr eax, 8",
    "dec ecx",
    "jnz 2b",
    "mov dx, 0x600",
    "mov al, 0x34",
    "out dx, al",
);

guest!(
    /// Sets up interrupt 9 (the generic event device's) and sleeps; when the power button is
    /// pressed it prints the event register on the serial port and powers off. Prints `w` once it
    /// is ready.
    wait_for_power_button,
    // An interrupt gate for vector 0x40 at 0x40000, and the interrupt table.
    "lea rax, [rip + 5f]",
    "mov ebx, 0x40400",
    "mov [rbx], ax",
    "mov word ptr [rbx + 2], 0x10",
    "mov word ptr [rbx + 4], 0x8e00",
    "shr rax, 16",
    "mov [rbx + 6], ax",
    "shr rax, 16",
    "mov [rbx + 8], eax",
    "mov dword ptr [rbx + 12], 0",
    "mov ebx, 0x3fff0",
    "mov word ptr [rbx], 0x40f",
    "mov dword ptr [rbx + 2], 0x40000",
    "mov dword ptr [rbx + 6], 0",
    "lidt [rbx]",
    // Local APIC on; IOAPIC pin 9 to vector 0x40, edge, unmasked.
    "mov ebx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov ebx, 0xfec00000",
    "mov dword ptr [rbx], 0x22",
    "mov dword ptr [rbx + 0x10], 0x40",
    "mov dword ptr [rbx], 0x23",
    "mov dword ptr [rbx + 0x10], 0",
    "mov dx, 0x3f8",
    "mov al, 'w'",
    "out dx, al",
    "4: sti",
    "hlt",
    "jmp 4b",
    "5: mov dx, 0x603",
    "in al, dx",
    "add al, '0'",
    "mov dx, 0x3f8",
    "out dx, al",
    "mov dx, 0x600",
    "mov al, 0x34",
    "out dx, al",
);

guest!(
    /// Starts vCPU 1 by INIT and SIPI; that one prints `1` from real mode and powers off.
    start_second_vcpu,
    // The second vCPU's code, at 0x8000.
    "lea rsi, [rip + 5f]",
    "mov edi, 0x8000",
    "mov ecx, 32",
    "2: mov al, [rsi]",
    "mov [rdi], al",
    "inc rsi",
    "inc rdi",
    "dec ecx",
    "jnz 2b",
    "mov ebx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov dword ptr [rbx + 0x310], 0x01000000",
    "mov dword ptr [rbx + 0x300], 0x4500",
    "mov dword ptr [rbx + 0x310], 0x01000000",
    "mov dword ptr [rbx + 0x300], 0x4608",
    "3: hlt",
    "jmp 3b",
    // 16-bit: mov dx, 0x3f8; mov al, '1'; out dx, al; mov dx, 0x600; mov al, 0x34; out dx, al;
    // hlt. Written as bytes, since the assembler's mode is 64-bit.
    "5: .byte 0xba, 0xf8, 0x03, 0xb0, 0x31, 0xee, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xf4",
    ".space 32",
);

guest!(
    /// Sets `DRIVER_OK` in the first virtio-mmio device without enabling any queue, writes to port
    /// 0xf0, and runs for ever.
    virtio_driver_ok,
    "mov ebx, 0xd0000000",
    "mov dword ptr [rbx + 0x70], 3",
    "mov dword ptr [rbx + 0x24], 1",
    "mov dword ptr [rbx + 0x20], 1",
    "mov dword ptr [rbx + 0x70], 0xb",
    "mov dword ptr [rbx + 0x70], 0xf",
    "out 0xf0, al",
    "2: jmp 2b",
);

guest!(
    /// Takes interrupts of the first virtio device on PCI by MSI-X: sets vector 0 of that to
    /// interrupt 0x40, and `DRIVER_OK` with vector 0 for the configuration; prints `m` when it
    /// comes, and powers off.
    virtio_pci_message,
    // An interrupt gate for vector 0x40 at 0x40000, and the interrupt table.
    "lea rax, [rip + 5f]",
    "mov ebx, 0x40400",
    "mov [rbx], ax",
    "mov word ptr [rbx + 2], 0x10",
    "mov word ptr [rbx + 4], 0x8e00",
    "shr rax, 16",
    "mov [rbx + 6], ax",
    "shr rax, 16",
    "mov [rbx + 8], eax",
    "mov dword ptr [rbx + 12], 0",
    "mov ebx, 0x3fff0",
    "mov word ptr [rbx], 0x40f",
    "mov dword ptr [rbx + 2], 0x40000",
    "mov dword ptr [rbx + 6], 0",
    "lidt [rbx]",
    "mov ebx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    // 00:01.0 answers in its BAR; its MSI-X capability.
    "mov ebx, 0xf0008000",
    "mov word ptr [rbx + 4], 6",
    "lea edi, [rbx + 0x33]",
    "2: mov al, [rdi + 1]",
    "movzx eax, al",
    "lea edi, [rbx + rax]",
    "mov al, [rdi]",
    "cmp al, 0x11",
    "jne 2b",
    // Vector 0 of the table, then MSI-X on.
    "mov ebx, 0xc0008000",
    "mov dword ptr [rbx], 0xfee00000",
    "mov dword ptr [rbx + 4], 0",
    "mov dword ptr [rbx + 8], 0x40",
    "mov dword ptr [rbx + 12], 0",
    "mov word ptr [rdi + 2], 0x8000",
    // The configuration's vector, and the device's start.
    "mov ebx, 0xc0000000",
    "mov byte ptr [rbx + 0x14], 3",
    "mov word ptr [rbx + 0x10], 0",
    "mov dword ptr [rbx + 8], 1",
    "mov dword ptr [rbx + 12], 1",
    "mov byte ptr [rbx + 0x14], 0xb",
    "mov byte ptr [rbx + 0x14], 0xf",
    "4: sti",
    "hlt",
    "jmp 4b",
    "5: mov dx, 0x3f8",
    "mov al, 'm'",
    "out dx, al",
    "mov dx, 0x600",
    "mov al, 0x34",
    "out dx, al",
);

guest!(
    /// Takes interrupts of the first virtio device on PCI by its INTx pin, level-triggered: sets
    /// `DRIVER_OK`, and prints `i` for each interrupt. It ends the first one without asking the
    /// device why it came; at others it prints the ISR status, ends it, waits a while, prints `.`
    /// and powers off.
    virtio_pci_line,
    "lea rax, [rip + 5f]",
    "mov ebx, 0x40400",
    "mov [rbx], ax",
    "mov word ptr [rbx + 2], 0x10",
    "mov word ptr [rbx + 4], 0x8e00",
    "shr rax, 16",
    "mov [rbx + 6], ax",
    "shr rax, 16",
    "mov [rbx + 8], eax",
    "mov dword ptr [rbx + 12], 0",
    "mov ebx, 0x3fff0",
    "mov word ptr [rbx], 0x40f",
    "mov dword ptr [rbx + 2], 0x40000",
    "mov dword ptr [rbx + 6], 0",
    "lidt [rbx]",
    // Local APIC on; IOAPIC pin 21 to vector 0x40, level, low, unmasked.
    "mov ebx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov ebx, 0xfec00000",
    "mov dword ptr [rbx], 0x3b",
    "mov dword ptr [rbx + 0x10], 0",
    "mov dword ptr [rbx], 0x3a",
    "mov dword ptr [rbx + 0x10], 0xa040",
    // 00:01.0 answers in its BAR; the device's start.
    "mov ebx, 0xf0008000",
    "mov word ptr [rbx + 4], 6",
    "mov ebx, 0xc0000000",
    "mov byte ptr [rbx + 0x14], 3",
    "mov dword ptr [rbx + 8], 1",
    "mov dword ptr [rbx + 12], 1",
    "mov byte ptr [rbx + 0x14], 0xb",
    "mov byte ptr [rbx + 0x14], 0xf",
    "mov ecx, 0",
    "4: sti",
    "hlt",
    "jmp 4b",
    // An interrupt: there is no way back from it but to wait for another one.
    "5: mov dx, 0x3f8",
    "mov al, 'i'",
    "out dx, al",
    "inc ecx",
    "cmp ecx, 1",
    "jne 6f",
    "mov ebx, 0xfee00000",
    "mov dword ptr [rbx + 0xb0], 0",
    "jmp 4b",
    "6: mov ebx, 0xc0001000",
    "mov al, [rbx]",
    "add al, '0'",
    "out dx, al",
    "mov ebx, 0xfee00000",
    "mov dword ptr [rbx + 0xb0], 0",
    "sti",
    "mov edi, 20000",
    "7: dec edi",
    "jnz 7b",
    "mov al, '.'",
    "out dx, al",
    "mov dx, 0x600",
    "mov al, 0x34",
    "out dx, al",
);

guest!(
    /// Notifies queue 0 of the first virtio device on PCI a thousand times, moves the device's BAR,
    /// notifies it a thousand times there, then writes a thousand times to where it was before, and
    /// powers off.
    virtio_pci_notify,
    "mov ebx, 0xf0008000",
    "mov word ptr [rbx + 4], 6",
    "mov edi, 0xc0010000",
    "mov ecx, 1000",
    "2: mov word ptr [rdi], 0",
    "dec ecx",
    "jnz 2b",
    "mov dword ptr [rbx + 0x10], 0xc8000000",
    "mov esi, 0xc8010000",
    "mov ecx, 1000",
    "3: mov word ptr [rsi], 0",
    "dec ecx",
    "jnz 3b",
    "mov ecx, 1000",
    "4: mov word ptr [rdi], 0",
    "dec ecx",
    "jnz 4b",
    "mov dx, 0x600",
    "mov al, 0x34",
    "out dx, al",
);

guest!(
    /// Sets `DRIVER_OK` in the first virtio-mmio device with a queue that lies nowhere, resets the
    /// device and does it again, for ever.
    virtio_bad_queue,
    "mov ebx, 0xd0000000",
    "2: mov dword ptr [rbx + 0x70], 0",
    "mov dword ptr [rbx + 0x70], 3",
    "mov dword ptr [rbx + 0x24], 1",
    "mov dword ptr [rbx + 0x20], 1",
    "mov dword ptr [rbx + 0x70], 0xb",
    "mov dword ptr [rbx + 0x30], 0",
    "mov dword ptr [rbx + 0x38], 16",
    "mov dword ptr [rbx + 0x44], 1",
    "mov dword ptr [rbx + 0x70], 0xf",
    "out 0xf0, al",
    "jmp 2b",
);
