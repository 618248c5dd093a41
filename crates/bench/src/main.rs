//! Kiln measured beside a bare KVM loop and QEMU's microvm, all in one run.
//!
//! `cargo xtask bench` builds the programs and runs this; docs/performance.md has results.
//!
//! | module | what lives there |
//! |---|---|
//! | `subject` | who is measured, and how each is started |
//! | `guest` | the guests, of a few bytes |
//! | `linux` | the guests that are Linux |
//! | `nested` | measuring in instructions: the nested machine, and this program in it |
//! | `start`, `exits`, `memory`, `boot`, `block`, `net` | the parts |
//! | `trace` | KVM's counters and trace points |
//! | `stats` | medians, quartiles, ratios |
//! | `bin/kvm_floor.rs` | the floor: KVM with nothing around it |
#![forbid(unsafe_code)]

mod block;
mod boot;
mod exits;
mod guest;
mod linux;
mod memory;
mod nested;
mod net;
mod start;
mod stats;
mod subject;
mod trace;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser, Subcommand};
use comfy_table::{CellAlignment, Table, presets};

use crate::nested::{GuestFiles, Plan};
use crate::stats::Row;
use crate::subject::Programs;

/// Measures Kiln beside a bare KVM loop and QEMU's microvm.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    part: Part,
}

#[derive(Debug, Subcommand)]
enum Part {
    /// Program start to the guest's first effect, and to the program's end.
    Start(Common),
    /// What an exit costs: in instructions where the nested machine is given, else in time.
    Exits(Common),
    /// Memory beside the guest's.
    Memory(Common),
    /// Many idle machines.
    Density(Common),
    /// Booting Debian's kernel, in instructions.
    Boot(Common),
    /// Disk operations, in instructions.
    Block(Common),
    /// TCP over a tap, in instructions.
    Net(Common),
    /// What the nested machine runs.
    #[command(hide = true)]
    Inside {
        /// What to measure.
        order: PathBuf,
    },
}

#[derive(Args, Clone, Debug)]
struct Common {
    /// The `kiln` program.
    #[arg(long)]
    kiln: PathBuf,
    /// The floor's program.
    #[arg(long)]
    floor: PathBuf,
    /// QEMU; left out where there is none.
    #[arg(long)]
    qemu: Option<PathBuf>,
    /// The program whose command `nested` runs others in the nested machine.
    #[arg(long)]
    nested: Option<PathBuf>,
    /// A description in JSON of what Linux guests are made of.
    #[arg(long)]
    guest: Option<PathBuf>,
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
    let part = Cli::parse().part;
    let common = match &part {
        Part::Inside { order } => return nested::inside(order),
        Part::Start(common)
        | Part::Exits(common)
        | Part::Memory(common)
        | Part::Density(common)
        | Part::Boot(common)
        | Part::Block(common)
        | Part::Net(common) => common.clone(),
    };
    ensure!(
        common.runs > 0 && common.exits > 0 && common.machines > 0,
        "a number is 0"
    );
    let programs = Programs {
        kiln: common.kiln,
        floor: common.floor,
        qemu: common.qemu,
    };
    let guest = common.guest.as_deref().map(guest_files).transpose()?;
    let plan = common.nested.as_deref().map(|xtask| Plan {
        xtask,
        programs: &programs,
        guest: guest.as_ref(),
    });
    let nested = || plan.as_ref().context("this takes --nested");
    let folder = tempfile::tempdir().context("make a temporary folder")?;
    let folder: &Path = folder.path();
    let (runs, exits) = (common.runs, common.exits);
    let rows = match part {
        Part::Start(_) => start::run(&programs, runs, folder)?,
        Part::Exits(_) if plan.is_some() => exits::in_instructions(nested()?, runs, exits)?,
        Part::Exits(_) => exits::in_time(&programs, runs, exits, folder)?,
        Part::Memory(_) => memory::run(&programs, runs, folder)?,
        Part::Density(_) => memory::density(&programs, common.machines, folder)?,
        Part::Boot(_) => boot::run(nested()?, runs)?,
        Part::Block(_) => block::run(nested()?, runs)?,
        Part::Net(_) => net::run(nested()?, runs)?,
        Part::Inside { .. } => Vec::new(),
    };
    if common.json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
    } else {
        println!("{}", table(&rows));
    }
    Ok(())
}

fn guest_files(path: &Path) -> Result<GuestFiles> {
    let text = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("read {}", path.display()))
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    table.set_header(["what", "of", "median", "quartiles", "ratio"]);
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
            row.ratio.map_or(String::new(), |ratio| {
                format!("{:.2} of {}", ratio.times, ratio.to)
            }),
        ]);
    }
    for column in [2, 3, 4] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}
