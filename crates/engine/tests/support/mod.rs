//! A model whose gradients are known in closed form, trained by ranks that are threads.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "each test file uses a part")]

pub mod saving;

use std::{sync::Arc, thread};

use deepspeed_comm::{Group, Options, Solo, threads};
use deepspeed_core::{AlignedBuffer, DType, ParamSpec, Span, SpanMut};
use deepspeed_engine::{Engine, EngineError, OptimizerChoice, Settings, StepReport};
use deepspeed_optim::{Hyper, LossScaler, OptimizerKind};

/// Shapes that are no multiple of anything, a scalar and an empty one among them.
pub const SHAPES: [&[usize]; 6] = [&[7, 5], &[3], &[0, 4], &[], &[257], &[64, 9]];

/// The loss of rank `r` in micro-batch `m` is half the squared distance of the weights to a target, so the gradient is
/// `weights - target(r, m)`.
pub fn target(param: usize, element: usize, rank: usize, micro: usize) -> f32 {
    let mix = (param * 31 + element * 17 + rank * 101 + micro * 57) % 1009;
    mix as f32 / 1009.0 - 0.5
}

pub fn specs(dtype: DType) -> Vec<ParamSpec> {
    let specs = SHAPES.iter().enumerate();
    specs
        .map(|(i, shape)| ParamSpec { name: format!("p{i}"), shape: shape.to_vec(), dtype, group: i % 2 })
        .collect()
}

/// One rank: its engine and its weights.
pub struct Replica {
    pub engine: Engine,
    pub weights: Vec<AlignedBuffer>,
    pub hypers: Vec<Hyper>,
    pub micro: usize,
    /// Whether every rank sees the data of rank 0, so that the number of ranks does not matter.
    pub same_data: bool,
}

impl Replica {
    pub fn new(settings: Settings, kind: OptimizerKind, scaler: LossScaler, group: Arc<dyn Group>) -> Self {
        let dtype = settings.precision;
        let mut hyper = Hyper::defaults(kind);
        hyper.lr = 0.05;
        hyper.weight_decay = 0.01;
        if kind == OptimizerKind::Sgd {
            hyper.momentum = 0.9;
        }
        let mut slow = hyper.clone();
        slow.lr = 0.01;
        let hypers = vec![hyper, slow];
        let originals: Vec<AlignedBuffer> = specs(dtype)
            .iter()
            .enumerate()
            .map(|(p, spec)| {
                let mut buffer = AlignedBuffer::zeroed(spec.numel(), DType::F32);
                for (i, x) in buffer.as_f32_mut().iter_mut().enumerate() {
                    *x = (((p * 13 + i * 7) % 97) as f32 / 97.0 - 0.5) * 1.001;
                }
                buffer
            })
            .collect();
        let choice = OptimizerChoice::Native(kind);
        let mut engine = Engine::new(settings, specs(dtype), vec![], choice, &hypers, scaler, group).unwrap();
        let spans: Vec<Span<'_>> = originals.iter().map(AlignedBuffer::span).collect();
        engine.load_masters(&spans).unwrap();
        if engine.keeps_weights() {
            engine.fill_weights(&spans, &[]).unwrap();
        }
        let weights = originals.iter().map(|original| cast(original.span(), dtype)).collect();
        Self { engine, weights, hypers, micro: 0, same_data: false }
    }

    /// At stage 3: looks at the weights that all ranks share, as a framework would.
    pub fn look_at_shared_weights(&mut self) {
        let Some(shared) = self.engine.shared_weights() else { return };
        for (weights, address) in self.weights.iter_mut().zip(shared.trained) {
            if let Some(address) = address {
                // SAFETY: the region lives as long as the engine, and no rank writes between a step and the next.
                let span = unsafe { Span::from_raw(address as *const u8, weights.len(), weights.dtype()) };
                deepspeed_kernels::cast(span, weights.span_mut());
            }
        }
    }

    /// Gradients of one micro-batch, in the weights' dtype, times the engine's loss factor.
    pub fn gradients(&self) -> Vec<AlignedBuffer> {
        let rank = self.data_rank();
        let factor = self.engine.loss_factor(true);
        let weights = self.weights.iter().enumerate();
        weights
            .map(|(p, weights)| {
                let mut gradient = cast(weights.span(), DType::F32);
                for (i, x) in gradient.as_f32_mut().iter_mut().enumerate() {
                    *x = (*x - target(p, i, rank, self.micro)) * factor;
                }
                cast(gradient.span(), weights.dtype())
            })
            .collect()
    }

    fn data_rank(&self) -> usize {
        if self.same_data { 0 } else { self.engine.group().rank().index() }
    }

    /// What the next micro-step makes smaller.
    pub fn loss(&self) -> f64 {
        let rank = self.data_rank();
        let weights = self.weights.iter().enumerate();
        let squares = weights.flat_map(|(p, weights)| {
            let weights = cast(weights.span(), DType::F32);
            let square = move |(i, x): (usize, &f32)| f64::from(x - target(p, i, rank, self.micro)).powi(2);
            weights.as_f32().iter().enumerate().map(square).collect::<Vec<_>>()
        });
        squares.sum::<f64>() / 2.0
    }

    pub fn micro_step(&mut self) -> Result<StepReport, EngineError> {
        let gradients = self.gradients();
        self.micro_step_with(&gradients.iter().map(|it| Some(it.span())).collect::<Vec<_>>())
    }

    pub fn micro_step_with(&mut self, gradients: &[Option<Span<'_>>]) -> Result<StepReport, EngineError> {
        self.micro += 1;
        self.engine.end_backward(gradients, 1.0)?;
        let mut weights: Vec<SpanMut<'_>> = self.weights.iter_mut().map(AlignedBuffer::span_mut).collect();
        let report = self.engine.step(&self.hypers, &mut weights)?;
        self.look_at_shared_weights();
        Ok(report)
    }

    /// All weights as bytes: what "bit-identical" compares.
    pub fn bytes(&self) -> Vec<u8> {
        self.weights.iter().flat_map(|weights| weights.span().as_bytes().to_vec()).collect()
    }
}

pub fn cast(source: Span<'_>, dtype: DType) -> AlignedBuffer {
    let mut out = AlignedBuffer::zeroed(source.len(), dtype);
    deepspeed_kernels::cast(source, out.span_mut());
    out
}

/// Runs `work` as every rank of `world`, each in a thread of its own, and gives the results in rank order.
pub fn ranks<T: Send>(world: usize, work: impl Fn(Arc<dyn Group>) -> T + Sync) -> Vec<T> {
    if world == 1 {
        return vec![work(Arc::new(Solo::new()))];
    }
    let groups = threads(world, &Options::default()).unwrap();
    thread::scope(|scope| {
        let handles: Vec<_> = groups
            .into_iter()
            .map(|group| {
                let work = &work;
                scope.spawn(move || work(Arc::new(group)))
            })
            .collect();
        handles.into_iter().map(|handle| handle.join().unwrap()).collect()
    })
}
