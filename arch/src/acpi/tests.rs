use super::*;
use crate::layout::{ACPI_TABLES_START, VIRTIO_MMIO_START};

fn full() -> AcpiConfig {
    AcpiConfig {
        apic_ids: vec![0, 1],
        serial: Some(SerialPort::COM1),
        rtc: true,
        i8042_keyboard: true,
        pvpanic: true,
        power_button: true,
        virtio_mmio: devices(3),
        pci: Some(root(31)),
    }
}

/// A bus with all pins of so many slots.
fn root(slots: u8) -> PciRoot {
    let pins = |slot| (0..4).map(move |pin| (slot, pin));
    let interrupts = (1..=slots).flat_map(pins).map(|(slot, pin)| PciInterrupt {
        slot,
        pin,
        gsi: layout::PCI_INTX_GSIS[usize::from(slot + pin) % 4],
    });
    PciRoot {
        interrupts: interrupts.collect(),
    }
}

fn devices(count: u32) -> Vec<VirtioMmio> {
    (0..count)
        .map(|number| VirtioMmio {
            address: VIRTIO_MMIO_START + u64::from(number) * 0x1000,
            size: 0x1000,
            gsi: 5 + number % 19,
        })
        .collect()
}

fn tables(config: &AcpiConfig) -> AcpiTables {
    build(config, ACPI_TABLES_START).unwrap()
}

fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    bytes[at..at + len]
        .iter()
        .rev()
        .fold(0, |sum, &byte| sum << 8 | u64::from(byte))
}

/// The table at a guest physical address, whole and with a good checksum.
fn table(tables: &AcpiTables, address: u64) -> &[u8] {
    let at = usize::try_from(address - tables.rsdp().0).unwrap();
    let bytes = &tables.bytes()[at..];
    let bytes = &bytes[..number(bytes, 4, 4) as usize];
    assert_eq!(
        sum(bytes),
        0,
        "checksum of {:?}",
        std::str::from_utf8(&bytes[..4])
    );
    assert_eq!(bytes[10..16], OEM_ID);
    bytes
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// The FADT, MADT and DSDT, found as a guest finds them.
fn found(tables: &AcpiTables) -> [&[u8]; 3] {
    let rsdp = &tables.bytes()[..36];
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    assert_eq!((rsdp[15], sum(&rsdp[..20]), sum(rsdp)), (2, 0, 0));
    let xsdt = table(tables, number(rsdp, 24, 8));
    assert_eq!(&xsdt[..4], b"XSDT");
    assert_eq!((xsdt.len() - 36) % 8, 0);
    let [fadt, madt] = [36, 44].map(|at| table(tables, number(xsdt, at, 8)));
    assert_eq!((&fadt[..4], &madt[..4]), (&b"FACP"[..], &b"APIC"[..]));
    let dsdt = table(tables, number(fadt, 140, 8));
    assert_eq!((&dsdt[..4], dsdt[8]), (&b"DSDT"[..], 2));
    [fadt, madt, dsdt]
}

/// The MCFG, where there is one.
fn mcfg(tables: &AcpiTables) -> Option<&[u8]> {
    let xsdt = table(tables, number(tables.bytes(), 24, 8));
    let mut entries = xsdt[36..].chunks_exact(8).skip(2);
    let found = table(tables, number(entries.next()?, 0, 8));
    assert_eq!(entries.next(), None);
    Some(found)
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

#[test]
fn every_table_is_found_from_the_rsdp_and_has_a_good_checksum() {
    for config in [
        full(),
        AcpiConfig {
            apic_ids: vec![0],
            ..Default::default()
        },
    ] {
        let tables = tables(&config);
        assert_eq!(tables.rsdp().0, ACPI_TABLES_START);
        found(&tables);
    }
}

#[test]
fn the_fadt_is_that_of_a_hardware_reduced_machine() {
    let tables = tables(&full());
    let [fadt, ..] = found(&tables);
    assert_eq!(fadt.len(), 276);
    assert_eq!((fadt[8], fadt[131]), (6, 5));
    // WBINVD; power button, sleep button and clock are no fixed ones; reset register;
    // hardware-reduced.
    assert_eq!(number(fadt, 112, 4), 1 | 0b111 << 4 | 1 << 10 | 1 << 20);
    let register = |at: usize| {
        (
            fadt[at],
            fadt[at + 1],
            fadt[at + 3],
            number(fadt, at + 4, 8),
        )
    };
    assert_eq!(register(116), (1, 8, 1, 0x602));
    assert_eq!(fadt[128], 1);
    assert_eq!(register(244), (1, 8, 1, 0x600));
    assert_eq!(register(256), (1, 8, 1, 0x601));
    // Nothing of the hardware that is left out: FACS, the 32-bit DSDT, SMI, event blocks.
    assert_eq!(fadt[36..44], [0; 8]);
    assert_eq!(fadt[46..109], [0; 63]);
    assert_eq!(fadt[148..244], [0; 96]);
}

#[test]
fn the_boot_flags_say_which_old_devices_there_are() {
    let flags = |config: &AcpiConfig| number(found(&tables(config))[0], 109, 2);
    assert_eq!(flags(&full()), 0b000111);
    let bare = AcpiConfig {
        apic_ids: vec![0],
        ..Default::default()
    };
    assert_eq!(flags(&bare), 0b100100);
}

#[test]
fn the_madt_lists_every_vcpu_in_order_and_ids_above_254_as_x2apic() {
    let config = AcpiConfig {
        apic_ids: (0..300).collect(),
        ..Default::default()
    };
    let tables = tables(&config);
    let [_, madt, _] = found(&tables);
    assert_eq!((number(madt, 36, 4), number(madt, 40, 4)), (0xfee0_0000, 0));
    let (mut at, mut cpus, mut rest) = (44, Vec::new(), Vec::new());
    while at < madt.len() {
        let entry = &madt[at..at + usize::from(madt[at + 1])];
        match entry[0] {
            0 => cpus.push((entry[3].into(), entry[2].into(), number(entry, 4, 4))),
            9 => cpus.push((
                number(entry, 4, 4),
                number(entry, 12, 4),
                number(entry, 8, 4),
            )),
            _ => rest.push(entry.to_vec()),
        }
        assert!(entry[0] != 9 || cpus.len() > 255);
        at += entry.len();
    }
    assert_eq!(cpus, (0..300).map(|id| (id, id, 1)).collect::<Vec<_>>());
    let ioapic = [1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0];
    let nmi = [4, 6, 0xff, 0, 0, 1];
    let x2apic_nmi = [10, 12, 0, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0];
    assert_eq!(rest, [&ioapic[..], &nmi, &x2apic_nmi]);
}

#[test]
fn gaps_in_the_apic_ids_are_kept() {
    let config = AcpiConfig {
        apic_ids: vec![0, 1, 4, 512],
        ..Default::default()
    };
    let tables = tables(&config);
    let [_, madt, _] = found(&tables);
    assert!(contains(madt, &[0, 8, 2, 4, 1, 0, 0, 0]));
    assert!(contains(
        madt,
        &[9, 16, 0, 0, 0, 2, 0, 0, 1, 0, 0, 0, 3, 0, 0, 0]
    ));
}

#[test]
fn the_dsdt_has_the_devices_that_are_there_and_no_others() {
    type Removal = fn(&mut AcpiConfig);
    let parts: [(&[u8], Removal); 8] = [
        (b"COM1", |config| config.serial = None),
        (b"RTC_", |config| config.rtc = false),
        (b"PS2K", |config| config.i8042_keyboard = false),
        (b"QEMU0001", |config| config.pvpanic = false),
        (b"ACPI0013", |config| config.power_button = false),
        (b"LNRO0005", |config| config.virtio_mmio.clear()),
        (b"PCI0", |config| config.pci = None),
        (b"MBRD", |config| config.pci = None),
    ];
    for (name, remove) in parts {
        let mut config = full();
        assert!(contains(found(&tables(&config))[2], name));
        remove(&mut config);
        let without = tables(&config);
        let dsdt = found(&without)[2];
        assert!(!contains(dsdt, name), "{}", String::from_utf8_lossy(name));
        // `_S5_`: a package of four, with the type twice.
        assert!(contains(
            dsdt,
            &[b'_', b'S', b'5', b'_', 0x12, 8, 4, 0x0a, 5, 0x0a, 5, 0, 0]
        ));
    }
}

#[test]
fn every_virtio_device_has_its_registers_and_an_edge_triggered_interrupt() {
    let config = AcpiConfig {
        virtio_mmio: devices(40),
        ..full()
    };
    let tables = tables(&config);
    let dsdt = found(&tables)[2];
    for (number, device) in config.virtio_mmio.iter().enumerate() {
        assert!(contains(dsdt, format!("V{number:03X}").as_bytes()));
        let mut resources = vec![0x86, 9, 0, 1];
        resources.extend((device.address as u32).to_le_bytes());
        resources.extend((device.size as u32).to_le_bytes());
        resources.extend([0x89, 6, 0, 0b0011, 1]);
        resources.extend(device.gsi.to_le_bytes());
        assert!(contains(dsdt, &resources), "device {number}");
    }
}

#[test]
fn a_pci_bus_has_its_configuration_space_in_a_table_and_as_a_resource() {
    let with = tables(&full());
    let table = mcfg(&with).unwrap();
    assert_eq!((&table[..4], table.len()), (&b"MCFG"[..], 60));
    assert_eq!(number(table, 44, 8), layout::PCI_CONFIG_START);
    // Segment 0, buses 0 to 0.
    assert_eq!(table[52..], [0; 8]);
    let mut resource = vec![0x86, 9, 0, 1];
    resource.extend((layout::PCI_CONFIG_START as u32).to_le_bytes());
    resource.extend((layout::PCI_CONFIG_SIZE as u32).to_le_bytes());
    assert!(contains(found(&with)[2], &resource));
    let config = AcpiConfig {
        pci: None,
        ..full()
    };
    let without = tables(&config);
    assert_eq!(mcfg(&without), None);
    assert!(!contains(found(&without)[2], &resource));
}

#[test]
fn a_pci_bus_has_a_window_and_the_interrupt_of_every_pin() {
    let tables = tables(&full());
    let dsdt = found(&tables)[2];
    // Memory, not cacheable, read and written, both ends fixed.
    let mut window = vec![0x87, 23, 0, 0, 0b1100, 1, 0, 0, 0, 0];
    window.extend((layout::PCI_MEMORY_START as u32).to_le_bytes());
    window.extend(((layout::PCI_MEMORY_START + layout::PCI_MEMORY_SIZE - 1) as u32).to_le_bytes());
    window.extend([0; 4]);
    window.extend((layout::PCI_MEMORY_SIZE as u32).to_le_bytes());
    assert!(contains(dsdt, &window));
    // A package of four: slot 31 and all its functions, INTD#, no link, interrupt 22.
    let entry = [0x12, 12, 4, 0x0c, 0xff, 0xff, 31, 0, 0x0a, 3, 0, 0x0a, 22];
    let entries = dsdt.windows(entry.len()).filter(|bytes| *bytes == entry);
    assert_eq!(entries.count(), 1);
}

/// Not installed everywhere: acpica-tools.
fn iasl(folder: &std::path::Path, arguments: &[&str]) -> Option<String> {
    let output = std::process::Command::new("iasl")
        .args(arguments)
        .current_dir(folder)
        .output()
        .map_err(|error| eprintln!("skipped: iasl: {error}"))
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    Some(text.into_owned())
}

#[test]
fn what_a_compiler_makes_of_the_disassembled_tables_is_clean() {
    let folder = tempfile::tempdir().unwrap();
    let without_pci = AcpiConfig {
        pci: None,
        ..full()
    };
    for config in [full(), without_pci] {
        let tables = tables(&config);
        let files = [("dsdt", Some(found(&tables)[2])), ("mcfg", mcfg(&tables))];
        for (name, bytes) in files {
            let Some(bytes) = bytes else { continue };
            let (binary, source) = (format!("{name}.aml"), format!("{name}.dsl"));
            std::fs::write(folder.path().join(&binary), bytes).unwrap();
            if iasl(folder.path(), &["-d", &binary]).is_none() {
                return;
            }
            let text = iasl(folder.path(), &["-va", &source]).unwrap();
            assert!(text.contains("0 Errors, 0 Warnings, 0 Remarks"), "{text}");
        }
    }
}

#[test]
fn the_largest_machine_fits() {
    let config = AcpiConfig {
        apic_ids: (0..crate::cpuid::MAX_VCPUS).collect(),
        virtio_mmio: devices(512),
        ..full()
    };
    assert!(tables(&config).bytes().len() as u64 <= ACPI_TABLES_SIZE);
    let config = AcpiConfig {
        virtio_mmio: devices(4096),
        ..config
    };
    let error = build(&config, ACPI_TABLES_START).unwrap_err();
    assert!(error.to_string().ends_with("bytes, of 131056"), "{error}");
}

#[test]
fn what_cannot_be_described_is_refused() {
    let refused = |change: fn(&mut AcpiConfig)| {
        let mut config = full();
        change(&mut config);
        build(&config, ACPI_TABLES_START).unwrap_err().to_string()
    };
    assert!(refused(|config| config.apic_ids.clear()).contains("0 vCPUs"));
    assert!(refused(|config| config.apic_ids = vec![0; 1025]).contains("1025 vCPUs"));
    assert!(refused(|config| config.virtio_mmio[1].gsi = 24).contains("interrupt 24"));
    assert!(refused(|config| config.virtio_mmio[1].size = 0).contains("device of 0x0 bytes"));
    assert!(refused(|config| config.virtio_mmio[1].address = 1 << 32).contains("0x100000000"));
    assert!(refused(|config| config.virtio_mmio[1].address = u64::MAX).contains("0xffff"));
    assert!(refused(|config| config.virtio_mmio = devices(4097)).contains("name 4097"));
    for (slot, pin) in [(32, 0), (0, 4)] {
        let interrupts = vec![PciInterrupt { slot, pin, gsi: 0 }];
        let config = AcpiConfig {
            pci: Some(PciRoot { interrupts }),
            ..full()
        };
        let error = build(&config, ACPI_TABLES_START).unwrap_err().to_string();
        assert!(error.contains(&format!("pin {pin} of PCI slot {slot}")));
    }
    for base in [ACPI_TABLES_START + 8, 1 << 32, u64::MAX - 15] {
        assert!(build(&full(), base).is_err());
    }
}
