//! The plan in words: a short block for the start of a run, and a table.

use std::{fmt, fmt::Write as _};

use serde::Serialize;

use crate::memory::{Bytes, Count, Facts, Free, Plan, Tier, Verdict, judge, verdict::needed};

/// A plan, what is free, and the answer, for people (`Display`) and programs (`Serialize`).
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Elements of all parameters.
    pub params: u64,
    /// Of these, trained.
    pub trainable: u64,
    /// Elements of the largest unit.
    pub largest_unit: u64,
    /// The ZeRO stage.
    pub stage: u8,
    /// Ranks of the run.
    pub world: u64,
    /// What it needs.
    pub plan: Plan,
    /// What there is.
    pub free: Free,
    /// Whether it fits.
    pub verdict: Verdict,
    /// The folder for nvme, where the config names one.
    pub nvme_path: Option<String>,
}

impl Report {
    /// Judges the plan of `facts`.
    pub fn new(facts: &Facts, free: &Free) -> Self {
        let paths = [&facts.offload_optimizer.nvme_path, &facts.offload_param.nvme_path];
        Self {
            params: (facts.params.trainable + facts.params.frozen).count(),
            trainable: facts.params.trainable.count(),
            largest_unit: facts.params.largest_unit,
            stage: facts.stage,
            world: facts.ranks(),
            plan: Plan::new(facts),
            free: free.clone(),
            verdict: judge(facts, free),
            nvme_path: paths.into_iter().flatten().next().map(|path| path.to_string_lossy().into_owned()),
        }
    }

    /// Why the run is refused, and what to change; `None` where it is not.
    pub fn refusal(&self) -> Option<String> {
        let Verdict::TooLarge { shortages, change } = &self.verdict else { return None };
        let mut out = String::from("the model state does not fit:");
        for shortage in shortages {
            let whose = match shortage.tier {
                Tier::Device => "each rank",
                Tier::Host | Tier::Nvme => "this host",
            };
            let _ = write!(
                out,
                " {whose} needs {} of {}, and {} are free ({});",
                Bytes(shortage.needed),
                shortage.tier,
                Bytes(shortage.free.bytes),
                shortage.free.origin
            );
        }
        out.pop();
        match change {
            Some(change) => {
                out.push_str("\nthe smallest change that fits:");
                for line in change.lines(self.nvme_path.as_deref()) {
                    let _ = write!(out, "\n  {line}");
                }
                let needs = Tier::ALL.into_iter().filter_map(|tier| {
                    let bytes = needed(&change.plan, tier, &self.free);
                    (bytes > 0).then(|| format!("{} of {tier}", Bytes(bytes)))
                });
                let _ = write!(out, "\nwhich needs {}", needs.collect::<Vec<_>>().join(" and "));
            }
            None => out.push_str("\nno ZeRO stage, offload or number of ranks that was tried makes it fit"),
        }
        Some(out)
    }

    /// What is left where it fits, or what is known where nothing is.
    fn praise(&self) -> String {
        match &self.verdict {
            Verdict::Unknown => "what is free is not known here".to_owned(),
            Verdict::TooLarge { .. } => String::new(),
            Verdict::Fits => {
                let left = Tier::ALL.into_iter().filter_map(|tier| {
                    let free = self.free.of(tier)?;
                    let needed = needed(&self.plan, tier, &self.free);
                    (needed > 0).then(|| format!("{} of {tier}", Bytes(free.bytes - needed)))
                });
                let left: Vec<String> = left.collect();
                if left.is_empty() {
                    return "fits".to_owned();
                }
                format!("fits; left for activations and everything else: {}", left.join(", "))
            }
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} parameters", Count(self.params))?;
        if self.trainable < self.params {
            write!(f, " ({} of them trained)", Count(self.trainable))?;
        }
        let (world, local) = (self.world, self.plan.ranks_per_host);
        writeln!(f, ", ZeRO stage {}, {world} rank(s), {local} on each host\n", self.stage)?;
        writeln!(f, "  {:<22} {:<20} {:>12} {:>12}", "", "", "per rank", "per host")?;
        let mut row = |what: &dyn fmt::Display, tier: Tier, per_rank, per_host, more: &str| {
            let (tier, per_rank, per_host) = (tier.to_string(), Bytes(per_rank), Bytes(per_host));
            let what = what.to_string();
            writeln!(f, "  {what:<22} {tier:<20} {per_rank:>12} {per_host:>12}{more}")
        };
        for line in &self.plan.rows {
            row(&line.kind, line.tier, line.amount.per_rank, line.amount.per_host, "")?;
        }
        for tier in Tier::ALL {
            let total = self.plan.total(tier);
            if total.per_host > 0 {
                row(&"total", tier, total.per_rank, total.per_host, "")?;
            }
        }
        for tier in Tier::ALL {
            let Some(limit) = self.free.of(tier).filter(|_| self.plan.total(tier).per_host > 0) else {
                continue;
            };
            let (tier, bytes) = (tier.to_string(), Bytes(limit.bytes).to_string());
            let (per_rank, per_host) = if tier == Tier::Device.to_string() {
                (bytes, String::new())
            } else {
                (String::new(), bytes)
            };
            writeln!(f, "  {:<22} {tier:<20} {per_rank:>12} {per_host:>12}  {}", "free", limit.origin)?;
        }
        writeln!(f)?;
        match self.refusal() {
            Some(refusal) => write!(f, "{refusal}"),
            None => f.write_str(&self.praise()),
        }
    }
}

/// The plan for the start of a run: two lines.
pub fn start_block(report: &Report) -> String {
    let plan = &report.plan;
    let totals = Tier::ALL.into_iter().filter_map(|tier| {
        let total = plan.total(tier);
        if total.per_host == 0 {
            return None;
        }
        let free = report.free.of(tier).map_or(String::new(), |limit| {
            let whose = if tier == Tier::Device { "free on each" } else { "free" };
            format!(", {} {whose} ({})", Bytes(limit.bytes), limit.origin)
        });
        let host = match plan.ranks_per_host {
            1 => String::new(),
            ranks => format!(", {} for the {ranks} ranks of this host", Bytes(total.per_host)),
        };
        Some(format!("{} of {tier} per rank{host}{free}", Bytes(total.per_rank)))
    });
    let kinds = plan.rows.iter().map(|row| {
        let place = match row.tier {
            Tier::Nvme => " on nvme",
            Tier::Host if plan.total(Tier::Device).per_host > 0 => " on the host",
            Tier::Host | Tier::Device => "",
        };
        format!("{} {}{place}", row.kind, Bytes(row.amount.per_rank))
    });
    format!(
        "memory plan: {}\n  per rank: {}",
        totals.collect::<Vec<_>>().join("; "),
        kinds.collect::<Vec<_>>().join(", ")
    )
}
