//! Operations, parameters and time of a model, module by module, and the report on them.

use std::fmt::Write as _;

/// One module.
#[derive(Clone, Debug)]
struct Module {
    path: String,
    class: String,
    params: u64,
    flops: u64,
    seconds: f64,
    calls: u64,
}

impl Module {
    /// The outermost module is at depth 0.
    fn depth(&self) -> usize {
        if self.path.is_empty() { 0 } else { self.path.matches('.').count() + 1 }
    }
}

/// What was counted of each module, the ones inside it included. The first is the whole model.
#[derive(Clone, Debug, Default)]
pub struct ModuleProfile {
    modules: Vec<Module>,
}

/// What the report says.
#[derive(Clone, Copy, Debug)]
pub struct ReportOptions {
    /// The step that was looked at.
    pub step: u64,
    /// The greatest depth that is reported; `None` for all.
    pub depth: Option<usize>,
    /// How many modules are named at each depth.
    pub top: usize,
    /// Whether every module is listed.
    pub detailed: bool,
    /// The cost of recomputation over that of forward.
    pub recompute: f64,
}

impl ModuleProfile {
    /// Modules in the order of the tree: path, class, parameters with those inside.
    pub fn new(modules: impl IntoIterator<Item = (String, String, u64)>) -> Self {
        let module = |(path, class, params)| Module { path, class, params, flops: 0, seconds: 0.0, calls: 0 };
        Self { modules: modules.into_iter().map(module).collect() }
    }

    /// Adds floating-point operations of the module at `path`, those inside it included. An unknown path is left out.
    pub fn add_flops(&mut self, path: &str, flops: u64) {
        if let Some(module) = self.modules.iter_mut().find(|it| it.path == path) {
            module.flops += flops;
        }
    }

    /// Adds a call of a module, by its number.
    pub fn add_time(&mut self, number: usize, seconds: f64) {
        if let Some(module) = self.modules.get_mut(number) {
            module.seconds += seconds;
            module.calls += 1;
        }
    }

    /// Forgets operations and times.
    pub fn reset(&mut self) {
        for module in &mut self.modules {
            (module.flops, module.seconds, module.calls) = (0, 0.0, 0);
        }
    }

    /// Floating-point operations of forward.
    pub fn flops(&self) -> u64 {
        self.modules.first().map_or(0, |it| it.flops)
    }

    /// Parameters.
    pub fn params(&self) -> u64 {
        self.modules.first().map_or(0, |it| it.params)
    }

    /// Seconds of forward.
    pub fn seconds(&self) -> f64 {
        self.modules.first().map_or(0.0, |it| it.seconds)
    }

    /// The report.
    pub fn report(&self, options: ReportOptions) -> String {
        let flops = self.flops() as f64;
        let mut out = format!("profile of step {}", options.step);
        // Backward computes a gradient for the input and one for the weights of each product (Kaplan et al., 2020).
        let backward = flops * (2.0 + options.recompute);
        let rate = if self.seconds() > 0.0 { flops / self.seconds() } else { 0.0 };
        let facts = [
            ("parameters", shown(self.params() as f64, "")),
            ("operations of forward", shown(flops, "FLOPs")),
            ("multiply-accumulates of forward", shown(flops / 2.0, "MACs")),
            ("operations of backward (estimate)", shown(backward, "FLOPs")),
            ("time of forward", shown_seconds(self.seconds())),
            ("speed of forward", shown(rate, "FLOPS")),
        ];
        for (name, value) in facts {
            let _ = write!(out, "\n  {name:<36}{value}");
        }
        let within = |module: &&Module| options.depth.is_none_or(|depth| module.depth() <= depth);
        let deepest = self.modules.iter().filter(within).map(Module::depth).max().unwrap_or(0);
        out.push_str("\nthe most expensive modules by depth");
        for depth in 0..=deepest {
            let mut level: Vec<&Module> = self.modules.iter().filter(|it| it.depth() == depth).collect();
            level.sort_by(|a, b| b.flops.cmp(&a.flops).then_with(|| b.seconds.total_cmp(&a.seconds)));
            for module in level.into_iter().take(options.top) {
                let _ = write!(out, "\n  {depth}  {}", self.line(module));
            }
        }
        if options.detailed {
            out.push_str("\nall modules");
            for module in self.modules.iter().filter(within) {
                let _ = write!(out, "\n  {}{}", "  ".repeat(module.depth()), self.line(module));
            }
        }
        out
    }

    fn line(&self, module: &Module) -> String {
        let share = |part: f64, whole: f64| if whole > 0.0 { 100.0 * part / whole } else { 0.0 };
        let name = if module.path.is_empty() { "(model)" } else { &module.path };
        format!(
            "{name} ({}): {} parameters, {} ({:.1} %), {} ({:.1} %)",
            module.class,
            shown(module.params as f64, ""),
            shown(module.flops as f64, "FLOPs"),
            share(module.flops as f64, self.flops() as f64),
            shown_seconds(module.seconds),
            share(module.seconds, self.seconds()),
        )
    }
}

/// A number with a decimal unit: `1.5 GFLOPs`.
pub fn shown(value: f64, unit: &str) -> String {
    const PREFIXES: [(f64, &str); 5] = [(1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")];
    let (divisor, prefix) = PREFIXES.into_iter().find(|(least, _)| value >= *least).unwrap_or((1.0, ""));
    let number = if divisor == 1.0 { format!("{value}") } else { format!("{:.2}", value / divisor) };
    format!("{number} {prefix}{unit}").trim_end().to_owned()
}

/// A time: `12.50 ms`.
pub fn shown_seconds(seconds: f64) -> String {
    if seconds >= 1.0 { format!("{seconds:.2} s") } else { format!("{:.2} ms", 1e3 * seconds) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_has_totals_and_modules() {
        let named = |path: &str, class: &str, params| (path.to_owned(), class.to_owned(), params);
        let mut profile = ModuleProfile::new([
            named("", "Model", 1_500),
            named("up", "Linear", 1_000),
            named("down", "Linear", 500),
        ]);
        profile.add_flops("", 3_000_000);
        profile.add_flops("up", 2_000_000);
        profile.add_flops("nowhere", 7);
        profile.add_time(0, 0.002);
        profile.add_time(1, 0.001);
        let options = ReportOptions { step: 3, depth: None, top: 1, detailed: true, recompute: 1.0 };
        let report = profile.report(options);
        for line in [
            "profile of step 3",
            "  operations of forward               3.00 MFLOPs",
            "  operations of backward (estimate)   9.00 MFLOPs",
            "  speed of forward                    1.50 GFLOPS",
            "  1  up (Linear): 1.00 K parameters, 2.00 MFLOPs (66.7 %), 1.00 ms (50.0 %)",
            "    down (Linear): 500 parameters, 0 FLOPs (0.0 %), 0.00 ms (0.0 %)",
        ] {
            assert!(report.lines().any(|it| it == line), "{line:?} is not in\n{report}");
        }
        let short = profile.report(ReportOptions { depth: Some(0), detailed: false, ..options });
        assert!(!short.contains("up"), "{short}");
        profile.reset();
        assert_eq!(profile.flops(), 0);
    }
}
