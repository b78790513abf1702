//! Waiting for a counter in shared memory: spin while that pays, then sleep in the kernel.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use rustix::thread::futex;

/// A counter that one rank advances and others wait for. It wraps around; see [`reached`].
#[repr(C)]
pub(crate) struct Word {
    value: AtomicU32,
    /// Ranks asleep on `value`. One that was killed asleep stays counted, which costs its peers a needless system
    /// call each time until they notice that it is gone.
    sleepers: AtomicU32,
}

/// How long a sleep lasts at most before the sleeper looks after its peers.
const SLEEP: Duration = Duration::from_millis(50);

impl Word {
    pub(crate) fn load(&self) -> u32 {
        self.value.load(Ordering::Acquire)
    }

    /// Advances the counter and wakes who sleeps on it; only the owner calls this.
    pub(crate) fn store(&self, value: u32) {
        // Sequentially consistent here and in `wait`: either the sleeper sees the new value before it sleeps, or
        // this sees the sleeper (COMM-4).
        self.value.store(value, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) != 0 {
            wake(self);
        }
    }
}

/// Wakes everybody who sleeps on the word, whatever its value, so that they look around.
pub(crate) fn wake(word: &Word) {
    // The call fails only for addresses that are none; a mapped word is one.
    let woken = futex::wake(&word.value, futex::Flags::empty(), i32::MAX as u32);
    debug_assert!(woken.is_ok(), "futex wake: {woken:?}");
}

/// Whether a wrapping counter has come to `target`: they are never further apart than a ring is long.
pub(crate) fn reached(value: u32, target: u32) -> bool {
    value.wrapping_sub(target) as i32 >= 0
}

/// How long to spin before sleeping: long while spinning succeeds, short once it does not.
#[derive(Debug)]
pub(crate) struct Spin {
    rounds: u32,
    most: u32,
}

impl Spin {
    const LEAST: u32 = 64;

    /// `crowded`: more ranks than cores, so that the awaited rank may need this core.
    pub(crate) fn new(crowded: bool) -> Self {
        let most = if crowded { Self::LEAST } else { 4096 };
        Self { rounds: most, most }
    }

    fn succeeded(&mut self) {
        self.rounds = (self.rounds * 2).min(self.most);
    }

    fn failed(&mut self) {
        self.rounds = (self.rounds / 2).max(Self::LEAST);
    }
}

/// Waits until `word` has come to `target`. After each sleep calls `look`, whose error ends the wait.
pub(crate) fn wait<E>(
    word: &Word,
    target: u32,
    spin: &mut Spin,
    mut look: impl FnMut() -> Result<(), E>,
) -> Result<(), E> {
    if reached(word.load(), target) {
        return Ok(());
    }
    for _ in 0..spin.rounds {
        std::hint::spin_loop();
        if reached(word.load(), target) {
            spin.succeeded();
            return Ok(());
        }
    }
    spin.failed();
    let limit = futex::Timespec { tv_sec: 0, tv_nsec: SLEEP.as_nanos() as _ };
    loop {
        word.sleepers.fetch_add(1, Ordering::SeqCst);
        let seen = word.value.load(Ordering::SeqCst);
        let slept = if reached(seen, target) {
            Ok(())
        } else {
            futex::wait(&word.value, futex::Flags::empty(), seen, Some(&limit))
        };
        word.sleepers.fetch_sub(1, Ordering::SeqCst);
        // Whatever ended the sleep (a wake, the limit, a change, a signal), the answer is to look again.
        debug_assert!(
            !matches!(slept, Err(rustix::io::Errno::INVAL | rustix::io::Errno::FAULT)),
            "futex wait: {slept:?}"
        );
        if reached(word.load(), target) {
            return Ok(());
        }
        look()?;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn word() -> Word {
        Word { value: AtomicU32::new(u32::MAX - 1), sleepers: AtomicU32::new(0) }
    }

    #[test]
    fn counters_wrap_around() {
        assert!(reached(0, u32::MAX));
        assert!(reached(5, 5));
        assert!(!reached(u32::MAX, 0));
    }

    #[test]
    fn sleepers_are_woken_across_the_wrap() {
        let word = Arc::new(word());
        let waiter = std::thread::spawn({
            let word = Arc::clone(&word);
            move || wait::<()>(&word, 1, &mut Spin::new(true), || Ok(()))
        });
        for value in [u32::MAX, 0, 1] {
            std::thread::sleep(Duration::from_millis(5));
            word.store(value);
        }
        waiter.join().unwrap().unwrap();
        assert_eq!(word.sleepers.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn looking_around_can_end_the_wait() {
        let mut looks = 0;
        let result = wait(&word(), 5, &mut Spin::new(false), || {
            looks += 1;
            if looks == 2 { Err("enough") } else { Ok(()) }
        });
        assert_eq!(result, Err("enough"));
    }

    #[test]
    fn spinning_adapts() {
        let mut spin = Spin::new(false);
        for _ in 0..20 {
            spin.failed();
        }
        assert_eq!(spin.rounds, Spin::LEAST);
        for _ in 0..20 {
            spin.succeeded();
        }
        assert_eq!(spin.rounds, 4096);
    }
}
