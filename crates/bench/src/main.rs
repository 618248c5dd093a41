//! Kiln measured beside a bare KVM loop and QEMU's microvm, all in one run.
//!
//! `cargo xtask bench` builds the programs and runs this; docs/performance.md has results.
//!
//! | module | what lives there |
//! |---|---|
//! | `subject` | who is measured, and how each is started |
//! | `guest` | the guests, of a few bytes |
//! | `start`, `exits`, `memory` | the parts |
//! | `stats` | medians, quartiles, ratios |
//! | `bin/kvm_floor.rs` | the floor: KVM with nothing around it |
#![forbid(unsafe_code)]

mod exits;
mod guest;
mod memory;
mod start;
mod stats;
mod subject;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use comfy_table::{CellAlignment, Table, presets};

use crate::stats::Row;
use crate::subject::Programs;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Program start to the guest's first effect, and to the program's end.
    Start,
    /// What an exit costs.
    Exits,
    /// Memory beside the guest's.
    Memory,
    /// Many idle machines.
    Density,
}

/// Measures Kiln beside a bare KVM loop and QEMU's microvm.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    /// What to measure.
    part: Part,
    /// The `kiln` program.
    #[arg(long)]
    kiln: PathBuf,
    /// The floor's program.
    #[arg(long)]
    floor: PathBuf,
    /// QEMU; left out where there is none.
    #[arg(long)]
    qemu: Option<PathBuf>,
    /// How often each is run.
    #[arg(long, default_value_t = 40)]
    runs: u32,
    /// How many exits a guest makes.
    #[arg(long, default_value_t = 20_000)]
    exits: u32,
    /// How many machines are idle at once.
    #[arg(long, default_value_t = 200)]
    machines: u32,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    ensure!(
        cli.runs > 0 && cli.exits > 0 && cli.machines > 0,
        "a number is 0"
    );
    let programs = Programs {
        kiln: cli.kiln,
        floor: cli.floor,
        qemu: cli.qemu,
    };
    let folder = tempfile::tempdir().context("make a temporary folder")?;
    let folder: &Path = folder.path();
    let rows = match cli.part {
        Part::Start => start::run(&programs, cli.runs, folder)?,
        Part::Exits => exits::run(&programs, cli.runs, cli.exits, folder)?,
        Part::Memory => memory::run(&programs, cli.runs, folder)?,
        Part::Density => memory::density(&programs, cli.machines, folder)?,
    };
    if cli.json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
    } else {
        println!("{}", table(&rows));
    }
    Ok(())
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    table.set_header(["what", "of", "median", "quartiles", "to floor"]);
    let mut last = "";
    for row in rows {
        let what = if row.what == last {
            ""
        } else {
            row.what.as_str()
        };
        last = &row.what;
        let summary = row.summary;
        table.add_row([
            what.to_owned(),
            row.subject.to_owned(),
            format!("{:.2}", summary.median),
            format!("{:.2} - {:.2}", summary.low, summary.high),
            row.to_floor
                .map_or(String::new(), |ratio| format!("{ratio:.2}")),
        ]);
    }
    for column in [2, 3, 4] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}
