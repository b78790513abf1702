//! Does it fit, and the smallest change that fits.

use deepspeed_config::{OffloadDevice, OffloadOptimizerConfig, OffloadParamConfig};
use deepspeed_core::DType;
use deepspeed_monitor::memory::{
    Change, Elements, Facts, Free, Limit, LimitOrigin, ParamCounts, Plan, Report, Tier, Verdict, judge,
    start_block,
};
use proptest::prelude::*;

const GIB: u64 = 1 << 30;

/// A billion bf16 parameters on `world` ranks of one host, with Adam.
fn billion(stage: u8, world: u64) -> Facts {
    Facts {
        checkpoint_copy: false,
        sub_group: u64::MAX,
        params: ParamCounts {
            trainable: Elements::of(DType::BF16, 1_000_000_000),
            frozen: Elements::default(),
            largest_unit: 50_000_000,
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

fn host(bytes: u64) -> Free {
    Free { host: Some(Limit { bytes, origin: LimitOrigin::Machine }), ..Free::default() }
}

/// The change that makes `facts` fit.
fn change(facts: &Facts, free: &Free) -> Change {
    match judge(facts, free) {
        Verdict::TooLarge { change: Some(change), .. } => *change,
        other => panic!("{other:?}"),
    }
}

#[test]
fn it_fits_or_nothing_is_known() {
    let facts = billion(0, 4);
    let need = Plan::new(&facts).total(Tier::Host).per_host;
    assert_eq!(judge(&facts, &host(need)), Verdict::Fits);
    assert!(matches!(judge(&facts, &host(need - 1)), Verdict::TooLarge { .. }));
    assert_eq!(judge(&facts, &Free::default()), Verdict::Unknown);
}

#[test]
fn weights_that_are_there_already_are_not_needed_once_more() {
    let facts = billion(0, 4);
    let need = Plan::new(&facts).total(Tier::Host).per_host;
    let free = Free { weights_held: 8_000_000_000, ..host(need - 8_000_000_000) };
    assert_eq!(judge(&facts, &free), Verdict::Fits);
}

#[test]
fn a_higher_stage_comes_first() {
    let facts = billion(0, 4);
    let need = |stage| Plan::new(&billion(stage, 4)).total(Tier::Host).per_host;
    let found = change(&facts, &host(need(2)));
    assert_eq!((found.stage, found.offload_optimizer, found.ranks_per_host), (Some(2), None, None));
    assert_eq!(found.lines(None), ["\"zero_optimization\": {\"stage\": 2}"]);
    assert_eq!(change(&facts, &host(need(2) - 1)).stage, Some(3));
}

#[test]
fn then_a_disk() {
    // Stage 3 of a billion parameters: 2 + 16 GB on a host, and gradients. On a CPU, `cpu` gains nothing.
    let found = change(&billion(2, 4), &host(8 * GIB));
    assert_eq!(
        (found.stage, found.offload_optimizer, found.offload_param),
        (Some(3), Some(OffloadDevice::Nvme), None)
    );
    assert_eq!(
        found.lines(Some("/fast")),
        [
            "\"zero_optimization\": {\"stage\": 3, \"offload_optimizer\": {\"device\": \"nvme\", \"nvme_path\": \"/fast\"}}"
        ]
    );
    let found = change(&billion(3, 4), &host(2 * GIB));
    let place = "\"device\": \"nvme\", \"nvme_path\": \"<a folder on a local disk>\"";
    let blocks =
        format!("\"offload_optimizer\": {{{place}}}, \"offload_param\": {{{place}, \"max_in_cpu\": 0}}");
    let expected = format!("\"zero_optimization\": {{{blocks}}}");
    assert_eq!(found.lines(None), [expected]);
}

#[test]
fn a_disk_that_is_full_is_no_way_out() {
    let free = Free { nvme: Some(Limit::given(GIB, "test")), ..host(12 * GIB) };
    let found = change(&billion(3, 4), &free);
    assert_eq!(found.offload_optimizer, None);
    assert!(found.hosts.is_some(), "{found:?}");
}

#[test]
fn on_accelerators_host_memory_is_the_first_way_out() {
    let mut facts = Facts { accelerator: true, shared_memory: false, ..billion(3, 4) };
    facts.live_parameters = 100_000_000;
    let free = Free { device: Some(Limit::given(3 * GIB, "test")), ..host(64 * GIB) };
    let found = change(&facts, &free);
    assert_eq!((found.offload_optimizer, found.offload_param), (Some(OffloadDevice::Cpu), None));
    assert_eq!(found.lines(None), ["\"zero_optimization\": {\"offload_optimizer\": {\"device\": \"cpu\"}}"]);
}

#[test]
fn what_is_live_is_lowered_before_anything_is_moved() {
    let facts = Facts { shared_memory: false, ..billion(3, 4) };
    let need = Plan::new(&Facts { live_parameters: 100_000_000, ..facts.clone() }).total(Tier::Host).per_host;
    let found = change(&facts, &host(need));
    assert_eq!(found.lines(None), ["\"zero_optimization\": {\"stage3_max_live_parameters\": 100000000}"]);
}

#[test]
fn fewer_ranks_where_no_setting_helps() {
    // One unit that every rank gathers whole, and a disk without space.
    let mut facts = Facts { shared_memory: false, ..billion(3, 8) };
    facts.params.largest_unit = 1_000_000_000;
    let free = Free { nvme: Some(Limit::given(GIB, "test")), ..host(40_000_000_000) };
    let found = change(&facts, &free);
    assert_eq!((found.stage, found.offload_optimizer, found.ranks_per_host), (None, None, Some(2)));
    assert_eq!(found.lines(None), ["deepspeed --num_gpus 2 ... (ranks on each host)"]);
}

#[test]
fn the_refusal_says_all_that_is_needed() {
    let refusal = Report::new(&billion(2, 2), &host(18 * GIB)).refusal().unwrap();
    assert_eq!(
        refusal,
        "the model state does not fit: this host needs 19.00 GiB of host memory, and 18.00 GiB are free (MemAvailable of \
         /proc/meminfo)\nthe smallest change that fits:\n  \"zero_optimization\": {\"stage\": 3}\nwhich needs 17.14 GiB \
         of host memory"
    );
    let params = ParamCounts { largest_unit: 1 << 50, ..billion(3, 1).params };
    let refusal = Report::new(&Facts { params, ..billion(3, 1) }, &host(1000)).refusal().unwrap();
    assert!(
        refusal.ends_with("no ZeRO stage, offload or number of ranks that was tried makes it fit"),
        "{refusal}"
    );
}

#[test]
fn the_block_at_the_start() {
    let report = Report::new(&billion(3, 4), &host(64 * GIB));
    assert_eq!(
        start_block(&report),
        "memory plan: 4.38 GiB of host memory per rank, 17.52 GiB for the 4 ranks of this host, 64.00 GiB free \
         (MemAvailable of /proc/meminfo)\n  per rank: weights 476.84 MiB, gradients 190.73 MiB, fp32 gradient shards \
         953.67 MiB, fp32 master weights 953.67 MiB, optimizer state 1.86 GiB, exchange buffers 2.00 MiB"
    );
}

#[test]
fn the_table() {
    let text = Report::new(&billion(3, 4), &host(64 * GIB)).to_string();
    assert!(text.starts_with("1.00 B parameters, ZeRO stage 3, 4 rank(s), 4 on each host\n"), "{text}");
    assert!(
        text.contains("  weights                host memory            476.84 MiB     1.86 GiB\n"),
        "{text}"
    );
    assert!(text.contains("left for activations and everything else"), "{text}");
}

proptest! {
    #[test]
    fn a_change_fits_and_each_part_of_it_is_needed(
        gib in 1u64..80, stage in 0u8..=3, world in 1u64..9, shared in any::<bool>(), disk in 0u64..40,
    ) {
        let mut facts = billion(stage, world);
        facts.shared_memory = shared;
        let free = Free { nvme: Some(Limit::given(disk * GIB, "test")), ..host(gib * GIB) };
        if let Verdict::TooLarge { change: Some(change), shortages } = judge(&facts, &free) {
            prop_assert!(!shortages.is_empty());
            prop_assert!(change.plan.total(Tier::Host).per_host <= gib * GIB);
            prop_assert!(change.plan.total(Tier::Nvme).per_host <= disk * GIB);
            prop_assert!(!change.lines(None).is_empty());
            // Without the first step it does not fit.
            if let (Some(stage), None, None, None, None, None) = (
                change.stage, change.live_parameters, change.offload_optimizer, change.offload_param,
                change.ranks_per_host, change.hosts,
            ) {
                let one_less = Facts { stage: stage - 1, ..facts.clone() };
                prop_assert!(Plan::new(&one_less).total(Tier::Host).per_host > gib * GIB);
            }
        }
    }
}

#[test]
fn saves_that_training_waits_for_are_the_first_to_go() {
    let facts = Facts { checkpoint_copy: true, ..billion(1, 4) };
    let bare = Plan::new(&billion(1, 4)).total(Tier::Host).per_host;
    let with_copy = Plan::new(&facts).total(Tier::Host).per_host;
    // Weights, masters and two moments, once on the host.
    assert_eq!(with_copy - bare, 14_000_000_000);
    assert_eq!(judge(&facts, &host(with_copy)), Verdict::Fits);
    let found = change(&facts, &host(with_copy - 1));
    assert_eq!((found.checkpoint_async, found.stage), (Some(false), None));
    assert_eq!(found.lines(None), ["\"checkpoint\": {\"async\": false}"]);
    // State on a disk is written from there.
    let nvme = OffloadOptimizerConfig { device: OffloadDevice::Nvme, ..OffloadOptimizerConfig::default() };
    let offloaded = Facts { offload_optimizer: nvme, ..facts.clone() };
    let bare = Plan::new(&Facts { checkpoint_copy: false, ..offloaded.clone() }).total(Tier::Host).per_host;
    assert_eq!(Plan::new(&offloaded).total(Tier::Host).per_host - bare, 2_000_000_000);
}
