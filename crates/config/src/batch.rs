//! Batch arithmetic: what is given of the three batch numbers, the world size, and what follows.
//!
//! ```text
//! train = micro x accumulation x world
//!
//! given               derived
//! all three           nothing, they are checked
//! train, micro        accumulation = train / (micro x world)
//! train, accumulation micro = train / (accumulation x world)
//! micro, accumulation train = micro x accumulation x world
//! train               accumulation = 1, micro = train / world
//! micro               accumulation = 1, train = micro x world
//! ```
//!
//! The original rounds the divisions down and then complains; here a division that leaves a rest is the complaint.

use std::fmt::Write as _;

/// A number that was given, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Given {
    /// The number, 1 or more.
    pub value: usize,
    /// Where it was given, as `line 2`.
    pub origin: String,
}

/// What is given.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BatchRequest {
    /// `train_batch_size`: samples per optimizer step over all ranks.
    pub train: Option<Given>,
    /// `train_micro_batch_size_per_gpu`: samples per rank and pass.
    pub micro: Option<Given>,
    /// `gradient_accumulation_steps`: passes per optimizer step.
    pub accumulation: Option<Given>,
}

/// The batch numbers a run has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Samples per optimizer step over all ranks.
    pub train: usize,
    /// Samples per rank and pass.
    pub micro: usize,
    /// Passes per optimizer step.
    pub accumulation: usize,
    /// The sum, with the origin of every number.
    pub explanation: String,
}

/// Batch numbers that do not fit together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchProblem {
    /// What is wrong, with every number and its origin.
    pub message: String,
    /// Values that would work.
    pub hints: Vec<String>,
}

const TRAIN: &str = "train_batch_size";
const MICRO: &str = "train_micro_batch_size_per_gpu";
const ACCUMULATION: &str = "gradient_accumulation_steps";

impl BatchRequest {
    /// Whether a batch size is given, so that a world size decides the rest.
    pub fn is_decidable(&self) -> bool {
        self.train.is_some() || self.micro.is_some()
    }

    /// Whether some world size fits the numbers given: the samples per step must divide by those of one rank.
    pub fn fits_some_world(&self) -> bool {
        let factor = |given: &Option<Given>| given.as_ref().map_or(1, |it| it.value);
        let per_rank = factor(&self.micro).saturating_mul(factor(&self.accumulation));
        self.train.as_ref().is_none_or(|train| per_rank != 0 && train.value.is_multiple_of(per_rank))
    }

    /// Derives what is missing for `world` data-parallel ranks; `world_origin` says where that number came from.
    ///
    /// # Errors
    /// Neither batch size is given, a product or quotient does not come out, or a number is 0.
    pub fn resolve(&self, world: usize, world_origin: &str) -> Result<Batch, BatchProblem> {
        if world == 0 {
            return Err(BatchProblem { message: "the world has no ranks".to_owned(), hints: Vec::new() });
        }
        let zero = [(TRAIN, &self.train), (MICRO, &self.micro), (ACCUMULATION, &self.accumulation)]
            .into_iter()
            .find_map(|(name, given)| {
                given.as_ref().filter(|given| given.value == 0).map(|given| (name, given))
            });
        if let Some((name, given)) = zero {
            return Err(BatchProblem {
                message: format!("{name} = 0 ({}) must be 1 or more", given.origin),
                hints: Vec::new(),
            });
        }
        let sum = Sum { request: self, world, world_origin };
        match (&self.train, &self.micro, &self.accumulation) {
            (None, None, _) => Err(BatchProblem {
                message: format!("neither {TRAIN} nor {MICRO} is given"),
                hints: vec![format!("give {MICRO}, the samples one rank takes at a time, e.g. 8")],
            }),
            (None, Some(micro), accumulation) => {
                let accumulation = accumulation.as_ref().map_or(1, |given| given.value);
                let train = micro
                    .value
                    .checked_mul(accumulation)
                    .and_then(|samples| samples.checked_mul(world))
                    .ok_or_else(|| sum.problem("the product is beyond 64 bits", Vec::new()))?;
                Ok(sum.batch(train, micro.value, accumulation))
            }
            (Some(train), None, None) => {
                if train.value % world != 0 {
                    return Err(sum.problem(
                        &format!("{} samples cannot be dealt evenly to {world} ranks", train.value),
                        vec![sum.multiples(train.value, Some(world)), sum.worlds(train.value)],
                    ));
                }
                Ok(sum.batch(train.value, train.value / world, 1))
            }
            (Some(train), Some(micro), None) => {
                sum.divide(train.value, micro.value, MICRO, |quotient| (micro.value, quotient))
            }
            (Some(train), None, Some(accumulation)) => {
                sum.divide(train.value, accumulation.value, ACCUMULATION, |quotient| {
                    (quotient, accumulation.value)
                })
            }
            (Some(train), Some(micro), Some(accumulation)) => {
                let samples = micro.value.checked_mul(accumulation.value);
                let product = samples.and_then(|samples| samples.checked_mul(world));
                if product == Some(train.value) {
                    return Ok(sum.batch(train.value, micro.value, accumulation.value));
                }
                let shown =
                    product.map_or("a number beyond 64 bits".to_owned(), |product| product.to_string());
                Err(sum.problem(
                    &format!(
                        "{} is not {} x {} x {world} = {shown}",
                        train.value, micro.value, accumulation.value
                    ),
                    sum.repairs(train.value, micro.value, accumulation.value),
                ))
            }
        }
    }
}

struct Sum<'a> {
    request: &'a BatchRequest,
    world: usize,
    world_origin: &'a str,
}

impl Sum<'_> {
    fn world_words(&self) -> String {
        match self.world_origin {
            "" => format!("world size = {}", self.world),
            origin => format!("world size = {} ({origin})", self.world),
        }
    }

    /// Every number that is given, with its origin.
    fn givens(&self) -> String {
        let mut out = String::new();
        for (name, given) in [
            (TRAIN, &self.request.train),
            (MICRO, &self.request.micro),
            (ACCUMULATION, &self.request.accumulation),
        ] {
            if let Some(Given { value, origin }) = given {
                let _ = write!(out, "{name} = {value} ({origin}), ");
            }
        }
        out + &self.world_words()
    }

    fn problem(&self, reason: &str, hints: Vec<String>) -> BatchProblem {
        BatchProblem {
            message: format!("the batch numbers do not fit together: {reason}; {}", self.givens()),
            hints,
        }
    }

    fn batch(&self, train: usize, micro: usize, accumulation: usize) -> Batch {
        let words = |given: &Option<Given>, derived: &str| match given {
            Some(given) => format!(" ({})", given.origin),
            None => format!(" ({derived})"),
        };
        let accumulation_origin =
            if accumulation == 1 && (self.request.train.is_none() || self.request.micro.is_none()) {
                "default"
            } else {
                "derived"
            };
        Batch {
            train,
            micro,
            accumulation,
            explanation: format!(
                "{TRAIN} {train}{} = {MICRO} {micro}{} x {ACCUMULATION} {accumulation}{} x {}",
                words(&self.request.train, "derived"),
                words(&self.request.micro, "derived"),
                words(&self.request.accumulation, accumulation_origin),
                self.world_words().replacen(" = ", " ", 1),
            ),
        }
    }

    /// `train` over `factor` (of this name) and the world; `pair` makes micro and accumulation of the quotient.
    fn divide(
        &self,
        train: usize,
        factor: usize,
        name: &str,
        pair: impl Fn(usize) -> (usize, usize),
    ) -> Result<Batch, BatchProblem> {
        let divisor = factor.checked_mul(self.world);
        if let Some(divisor) = divisor
            && train.is_multiple_of(divisor)
        {
            let (micro, accumulation) = pair(train / divisor);
            return Ok(self.batch(train, micro, accumulation));
        }
        let mut hints = vec![self.multiples(train, divisor)];
        if train.is_multiple_of(self.world) {
            let good = divisors_near(train / self.world, factor);
            hints.push(format!("or {name} {}", or_list(&good)));
        }
        if train.is_multiple_of(factor) {
            hints.push(self.worlds(train / factor));
        }
        let shown = divisor.map_or("a number beyond 64 bits".to_owned(), |divisor| divisor.to_string());
        Err(self.problem(&format!("{train} is not a multiple of {factor} x {} = {shown}", self.world), hints))
    }

    fn multiples(&self, train: usize, divisor: Option<usize>) -> String {
        let Some(divisor) = divisor else { return format!("choose a smaller number than {train}") };
        let below = train / divisor * divisor;
        let good: Vec<usize> =
            [Some(below), below.checked_add(divisor)].into_iter().flatten().filter(|n| *n > 0).collect();
        format!("{TRAIN} {} would work", or_list(&good))
    }

    fn worlds(&self, samples: usize) -> String {
        format!(
            "or a world size of {}: check that the launcher started as many ranks as you meant",
            or_list(&divisors_near(samples, self.world))
        )
    }

    fn repairs(&self, train: usize, micro: usize, accumulation: usize) -> Vec<String> {
        let mut hints = Vec::new();
        let product = |a: usize, b: usize| a.checked_mul(b).filter(|product| train.is_multiple_of(*product));
        if let Some(product) = product(micro, accumulation) {
            hints.push(format!(
                "a world size of {} would fit: check that the launcher started as many ranks as you meant",
                train / product
            ));
        }
        if let Some(all) = micro.checked_mul(accumulation).and_then(|samples| samples.checked_mul(self.world))
        {
            hints.push(format!("{TRAIN} {all} would work"));
        }
        if let Some(product) = product(micro, self.world) {
            hints.push(format!("{ACCUMULATION} {} would work", train / product));
        }
        if let Some(product) = product(accumulation, self.world) {
            hints.push(format!("{MICRO} {} would work", train / product));
        }
        hints.push("or delete one of the three: it is derived from the others".to_owned());
        hints
    }
}

/// Up to four divisors of `n`, those around `wanted`, in order.
fn divisors_near(n: usize, wanted: usize) -> Vec<usize> {
    let mut found = Vec::new();
    // Config numbers are small; the bound keeps an absurd one from taking time.
    for low in (1..=100_000).take_while(|low: &usize| low.saturating_mul(*low) <= n) {
        if n.is_multiple_of(low) {
            found.push(low);
            found.push(n / low);
        }
    }
    found.sort_by_key(|divisor| (divisor.abs_diff(wanted), *divisor));
    found.dedup();
    found.truncate(4);
    found.sort_unstable();
    found
}

fn or_list(numbers: &[usize]) -> String {
    let words: Vec<String> = numbers.iter().map(usize::to_string).collect();
    match &words[..] {
        [] => "other than this".to_owned(),
        [one] => one.clone(),
        [most @ .., last] => format!("{} or {last}", most.join(", ")),
    }
}
