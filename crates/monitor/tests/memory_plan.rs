//! The arithmetic of the memory plan through its public door.

use deepspeed_config::{OffloadDevice, OffloadOptimizerConfig, OffloadParamConfig};
use deepspeed_core::DType;
use deepspeed_monitor::memory::{Amount, Elements, Facts, Kind, ParamCounts, Plan, Tier};
use proptest::prelude::*;

const MIB: u64 = 1 << 20;

/// `count` elements of `dtype`, trained, of which a tenth is the largest unit, on `world` ranks of one host.
fn facts(dtype: DType, count: u64, stage: u8, world: u64) -> Facts {
    Facts {
        checkpoint_copy: false,
        sub_group: u64::MAX,
        params: ParamCounts {
            trainable: Elements::of(dtype, count),
            frozen: Elements::default(),
            largest_unit: count / 10,
        },
        stage,
        world,
        ranks_per_host: world,
        accelerator: false,
        shared_memory: true,
        state_tensors: 2,
        whole_state: false,
        accumulation: 1,
        live_parameters: 1_000_000_000,
        offload_optimizer: OffloadOptimizerConfig::default(),
        offload_param: OffloadParamConfig::default(),
    }
}

fn per_rank(facts: &Facts, kind: Kind) -> u64 {
    Plan::new(facts).kind(kind).per_rank
}

#[test]
fn bf16_with_adam_at_each_stage() {
    let n = 1_000_000;
    for (stage, weights, gradients) in
        [(0, 2 * n, 2 * n), (1, 2 * n, 2 * n), (2, 2 * n, 2 * n / 5), (3, n, 2 * n / 5)]
    {
        let plan = Plan::new(&facts(DType::BF16, n, stage, 2));
        let of = |kind| plan.kind(kind).per_rank;
        assert_eq!(of(Kind::Weights), weights, "stage {stage}");
        assert_eq!(of(Kind::Gradients), gradients, "stage {stage}");
        // With our optimizers the rest is sharded at every stage, stage 0 included.
        assert_eq!(of(Kind::GradientShards), 4 * n / 2, "stage {stage}");
        assert_eq!(of(Kind::MasterWeights), 4 * n / 2, "stage {stage}");
        assert_eq!(of(Kind::OptimizerState), 8 * n / 2, "stage {stage}");
        assert_eq!(of(Kind::GatheredWeights), 0, "what is shared is not gathered");
        assert_eq!(of(Kind::ExchangeBuffers), 2 * MIB);
    }
}

#[test]
fn fp32_weights_are_their_own_masters() {
    let plan = Plan::new(&facts(DType::F32, 1000, 1, 1));
    assert_eq!(plan.kind(Kind::MasterWeights), Amount::default());
    assert_eq!(plan.kind(Kind::Weights).per_rank, 4000);
    assert_eq!(plan.kind(Kind::ExchangeBuffers), Amount::default(), "one rank exchanges nothing");
}

#[test]
fn micro_batches_add_up_in_fp32_below_stage_2() {
    for (stage, whole) in [(0, 4000), (1, 4000), (2, 0), (3, 0)] {
        let facts = Facts { accumulation: 4, ..facts(DType::BF16, 1000, stage, 2) };
        assert_eq!(per_rank(&facts, Kind::WholeGradients), whole, "stage {stage}");
    }
}

#[test]
fn a_clients_optimizer_at_stage_0_sees_everything() {
    let facts = Facts { whole_state: true, ..facts(DType::BF16, 1000, 0, 4) };
    assert_eq!(per_rank(&facts, Kind::OptimizerState), 8000);
    assert_eq!(per_rank(&facts, Kind::MasterWeights), 4000);
    assert_eq!(per_rank(&facts, Kind::WholeGradients), 4000);
    assert_eq!(per_rank(&facts, Kind::GradientShards), 1000);
}

#[test]
fn frozen_parameters_have_weights_only() {
    let mut facts = facts(DType::BF16, 1000, 2, 2);
    facts.params.frozen = Elements::of(DType::BF16, 5000);
    let plan = Plan::new(&facts);
    assert_eq!(plan.kind(Kind::Weights).per_rank, 12_000);
    assert_eq!(plan.kind(Kind::OptimizerState).per_rank, 4000);
    let sharded = Plan::new(&Facts { stage: 3, ..facts });
    assert_eq!(sharded.kind(Kind::Weights), Amount { per_rank: 6000, per_host: 12_000 }, "one copy");
}

#[test]
fn without_shared_memory_stage_3_gathers() {
    let facts = Facts { shared_memory: false, live_parameters: 300, ..facts(DType::BF16, 1000, 3, 4) };
    assert_eq!(per_rank(&facts, Kind::Weights), 500);
    assert_eq!(per_rank(&facts, Kind::GatheredWeights), 600);
    let plan = Plan::new(&facts);
    assert_eq!(plan.kind(Kind::Weights).per_host, 2000);
    let starved = Facts { live_parameters: 0, ..facts };
    assert_eq!(per_rank(&starved, Kind::GatheredWeights), 200, "a unit is whole while it is used");
}

#[test]
fn offload_moves_bytes_between_tiers_and_loses_none() {
    let base = Facts { accelerator: true, shared_memory: false, ..facts(DType::BF16, 1000, 2, 2) };
    let state = |facts: &Facts, tier| {
        let plan = Plan::new(facts);
        [Kind::GradientShards, Kind::MasterWeights, Kind::OptimizerState]
            .map(|kind| plan.at(kind, tier).per_rank)
    };
    assert_eq!(state(&base, Tier::Device), [2000, 2000, 4000]);
    let offloaded = |device, ratio| Facts {
        offload_optimizer: OffloadOptimizerConfig { device, ratio, ..OffloadOptimizerConfig::default() },
        ..base.clone()
    };
    let cpu = offloaded(OffloadDevice::Cpu, 1.0);
    assert_eq!(state(&cpu, Tier::Device), [0, 0, 0]);
    assert_eq!(state(&cpu, Tier::Host), [2000, 2000, 4000]);
    let quarter = offloaded(OffloadDevice::Cpu, 0.25);
    assert_eq!(state(&quarter, Tier::Device), [1500, 1500, 3000]);
    assert_eq!(state(&quarter, Tier::Host), [500, 500, 1000]);
    let nvme = offloaded(OffloadDevice::Nvme, 1.0);
    assert_eq!(state(&nvme, Tier::Host), [0, 0, 0]);
    assert_eq!(state(&nvme, Tier::Nvme), [2000, 2000, 4000]);
    // One slot of master, two moments and gradient of the largest unit's shard, and the gradient that is reduced; a pipeline
    // takes `buffer_count` slots.
    assert_eq!(Plan::new(&nvme).at(Kind::OffloadBuffers, Tier::Host).per_rank, (4 + 1) * 50 * 4);
    let mut pipelined = nvme;
    pipelined.offload_optimizer.pipeline_read = true;
    assert_eq!(Plan::new(&pipelined).at(Kind::OffloadBuffers, Tier::Host).per_rank, (4 * 4 + 1) * 50 * 4);
    let cut = Facts { stage: 3, sub_group: 20, ..pipelined };
    assert_eq!(
        Plan::new(&cut).at(Kind::OffloadBuffers, Tier::Host).per_rank,
        (4 * 4 * 20 + 50) * 4,
        "in pieces"
    );
}

#[test]
fn parameters_on_nvme_leave_a_window() {
    let mut facts = Facts { live_parameters: 150, ..facts(DType::BF16, 1000, 3, 2) };
    facts.offload_param.device = OffloadDevice::Nvme;
    let kept = |max_in_cpu| {
        let offload_param = OffloadParamConfig { max_in_cpu, ..facts.offload_param.clone() };
        Plan::new(&Facts { offload_param, ..facts.clone() }).kind(Kind::GatheredWeights)
    };
    assert_eq!(kept(100), Amount { per_rank: 400, per_host: 800 }, "and 100 elements of each rank");
    assert_eq!(kept(usize::MAX), Amount { per_rank: 1000, per_host: 2000 });
    facts.offload_param.max_in_cpu = 0;
    let plan = Plan::new(&facts);
    assert_eq!(plan.kind(Kind::Weights), Amount { per_rank: 1000, per_host: 2000 });
    assert_eq!(plan.at(Kind::Weights, Tier::Host), Amount::default());
    assert_eq!(plan.kind(Kind::GatheredWeights), Amount { per_rank: 200, per_host: 400 }, "two units");
    assert_eq!(plan.kind(Kind::OffloadBuffers), Amount::default(), "the file is mapped");
    let apart = Plan::new(&Facts { shared_memory: false, ..facts });
    assert_eq!(apart.at(Kind::Weights, Tier::Nvme), Amount { per_rank: 1000, per_host: 2000 }, "a file each");
    assert_eq!(
        apart.kind(Kind::OffloadBuffers),
        Amount { per_rank: 200, per_host: 400 },
        "two units' shards"
    );
    assert_eq!(
        apart.kind(Kind::GatheredWeights),
        Amount { per_rank: 300, per_host: 600 },
        "as much as may live"
    );
}

prop_compose! {
    fn any_elements()(fp32 in 0u64..5_000_000, bf16 in 0u64..5_000_000, fp16 in 0u64..5_000_000) -> Elements {
        Elements { fp32, bf16, fp16 }
    }
}

prop_compose! {
    fn any_device()(index in 0usize..3) -> OffloadDevice {
        [OffloadDevice::None, OffloadDevice::Cpu, OffloadDevice::Nvme][index]
    }
}

prop_compose! {
    fn any_facts()(
        trainable in any_elements(),
        frozen in any_elements(),
        largest_unit in 1u64..3_000_000,
        stage in 0u8..=3,
        (hosts, ranks_per_host) in (1u64..4, 1u64..9),
        (accelerator, shared_memory, whole_state) in any::<(bool, bool, bool)>(),
        state_tensors in 0u64..3,
        accumulation in 1u64..3,
        live_parameters in 0u64..20_000_000,
        (optimizer, ratio) in (any_device(), 0.0f64..=1.0),
        param in any_device(),
    ) -> Facts {
        Facts {
            checkpoint_copy: false,
            sub_group: u64::MAX,
            params: ParamCounts { trainable, frozen, largest_unit },
            stage,
            world: hosts * ranks_per_host,
            ranks_per_host,
            accelerator,
            shared_memory: shared_memory && hosts == 1,
            state_tensors,
            whole_state: whole_state && stage == 0,
            accumulation,
            live_parameters,
            offload_optimizer: OffloadOptimizerConfig { device: optimizer, ratio, ..OffloadOptimizerConfig::default() },
            offload_param: OffloadParamConfig { device: param, ..OffloadParamConfig::default() },
        }
    }
}

/// Bytes of a rank wherever they lie.
fn everywhere(facts: &Facts) -> u64 {
    let plan = Plan::new(facts);
    Tier::ALL.into_iter().map(|tier| plan.total(tier).per_rank).sum()
}

proptest! {
    #[test]
    fn a_host_needs_the_sum_of_its_ranks(facts in any_facts()) {
        let plan = Plan::new(&facts);
        for row in &plan.rows {
            let sum = row.amount.per_rank * facts.ranks_per_host;
            // Shares of memory that is shared are rounded up.
            prop_assert!(row.amount.per_host <= sum && sum < row.amount.per_host + facts.ranks_per_host, "{row:?}");
        }
        for tier in Tier::ALL {
            let total: u64 = plan.rows.iter().filter(|row| row.tier == tier).map(|row| row.amount.per_host).sum();
            prop_assert_eq!(plan.total(tier).per_host, total);
        }
        prop_assert!(facts.accelerator || plan.total(Tier::Device) == Amount::default());
    }

    #[test]
    fn more_ranks_never_need_more_each(facts in any_facts(), factor in 2u64..5) {
        // Twice the hosts: nothing that a host's ranks share gets lost.
        let more = Facts { world: facts.world * factor, ..facts.clone() };
        let kinds = [Kind::GradientShards, Kind::MasterWeights, Kind::OptimizerState];
        for kind in kinds {
            prop_assert!(per_rank(&more, kind) <= per_rank(&facts, kind), "{kind:?}");
        }
        if !facts.shared_memory {
            prop_assert!(per_rank(&more, Kind::Weights) <= per_rank(&facts, Kind::Weights));
        }
    }

    #[test]
    fn a_higher_stage_never_needs_more_of_a_rank(facts in any_facts(), stage in 0u8..3) {
        // Gathering needs memory of its own: that stage 3 may need more than stage 2 where a lot is live is no error.
        let whole = facts.params.trainable + facts.params.frozen;
        let shared = facts.shared_memory && !facts.accelerator;
        prop_assume!(
            stage < 2 || shared || facts.world == 1 || (
                facts.world > 1 && facts.live_parameters.max(facts.params.largest_unit) <= whole.count() / 4
                    && whole.fp32 == 0
            )
        );
        let plain = Facts {
            accumulation: 1,
            whole_state: false,
            offload_optimizer: OffloadOptimizerConfig::default(),
            offload_param: OffloadParamConfig::default(),
            ..facts
        };
        let lower = everywhere(&Facts { stage, ..plain.clone() });
        let higher = everywhere(&Facts { stage: stage + 1, ..plain.clone() });
        prop_assert!(higher <= lower + 8, "stage {stage}: {lower}, stage {}: {higher}", stage + 1);
    }

    #[test]
    fn optimizer_offload_loses_no_byte(facts in any_facts(), ratio in 0.0f64..=1.0) {
        prop_assume!(facts.stage > 0);
        let with = |device| {
            let offload_optimizer = OffloadOptimizerConfig { device, ratio, ..facts.offload_optimizer.clone() };
            let plan = Plan::new(&Facts { offload_optimizer, ..facts.clone() });
            [Kind::GradientShards, Kind::MasterWeights, Kind::OptimizerState].map(|kind| plan.kind(kind))
        };
        prop_assert_eq!(with(OffloadDevice::None), with(OffloadDevice::Cpu));
        prop_assert_eq!(with(OffloadDevice::None), with(OffloadDevice::Nvme));
    }

    #[test]
    fn parameter_offload_loses_no_byte(facts in any_facts()) {
        let with = |device| {
            let offload_param = OffloadParamConfig { device, ..facts.offload_param.clone() };
            Plan::new(&Facts { stage: 3, offload_param, ..facts.clone() }).kind(Kind::Weights).per_host
        };
        prop_assert_eq!(with(OffloadDevice::None), with(OffloadDevice::Cpu));
        prop_assert_eq!(with(OffloadDevice::None), with(OffloadDevice::Nvme));
    }

    #[test]
    fn numbers_beyond_all_bounds_saturate(count in any::<u64>(), world in any::<u64>(), stage in 0u8..=3) {
        let facts = Facts { accumulation: 2, ..facts(DType::F32, count, stage, world) };
        let plan = Plan::new(&facts);
        prop_assert!(plan.total(Tier::Host).per_host >= plan.kind(Kind::Weights).per_host);
    }
}
