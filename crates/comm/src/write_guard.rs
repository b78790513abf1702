//! Says why a process dies that writes to guarded weights, where it would die without a word.
//!
//! The guard is the processor's: the framework's view is mapped read-only, and a write raises SIGSEGV. The handler here
//! looks whether the address is a guarded one, writes one sentence to stderr, and hands on to whatever handled the signal
//! before, which ends the process: the default action, or a handler that prints a traceback first (faulthandler).

use std::{
    mem::MaybeUninit,
    ops::Range,
    ptr,
    sync::{
        Mutex, Once, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

/// Views that can be guarded at a time; one more is guarded all the same, but dies without the sentence.
const VIEWS: usize = 32;

/// First byte and one past the last of each guarded view; zeros where there is none. Only atomics: a signal handler may
/// not wait for a lock.
static GUARDED: [(AtomicUsize, AtomicUsize); VIEWS] =
    [const { (AtomicUsize::new(0), AtomicUsize::new(0)) }; VIEWS];
/// Held while the table is changed.
static CHANGE: Mutex<()> = Mutex::new(());

const SENTENCE: &str = "\ndeepspeed: the program wrote to a weight in place. At ZeRO stage 3 the ranks of a host share one \
copy of the weights, so a write by one rank would change them under all: write them within \
deepspeed.zero.GatheredParameters(parameters, modifier_rank=R), where rank R writes for all. (PYTHONFAULTHANDLER=1 shows \
the line.)\n";

/// A view is guarded for as long as this lives.
#[derive(Debug)]
pub(crate) struct WriteGuard {
    view: Range<usize>,
}

impl WriteGuard {
    /// Guards the addresses `view`.
    pub(crate) fn new(view: Range<usize>) -> Self {
        static INSTALL: Once = Once::new();
        INSTALL.call_once(install);
        let _one = CHANGE.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((start, end)) = GUARDED.iter().find(|(start, _)| start.load(Ordering::Relaxed) == 0) {
            end.store(view.end, Ordering::Relaxed);
            start.store(view.start, Ordering::Release);
        }
        Self { view }
    }
}

impl Drop for WriteGuard {
    fn drop(&mut self) {
        let _one = CHANGE.lock().unwrap_or_else(PoisonError::into_inner);
        for (start, _) in &GUARDED {
            if start.load(Ordering::Relaxed) == self.view.start {
                start.store(0, Ordering::Release);
            }
        }
    }
}

/// What handled SIGSEGV before. Written once, before the handler that reads it is installed.
static mut BEFORE: MaybeUninit<libc::sigaction> = MaybeUninit::uninit();

fn install() {
    // SAFETY: both structures are initialised by zeroing and sigemptyset, `BEFORE` is written before any handler can
    // read it, and this runs once. The handler only does what a signal handler may: atomics, write(2), sigaction(2).
    unsafe {
        let mut before = MaybeUninit::<libc::sigaction>::zeroed();
        if libc::sigaction(libc::SIGSEGV, ptr::null(), before.as_mut_ptr()) != 0 {
            return;
        }
        ptr::addr_of_mut!(BEFORE).write(before);
        let mut action = MaybeUninit::<libc::sigaction>::zeroed().assume_init();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigemptyset(&raw mut action.sa_mask);
        libc::sigaction(libc::SIGSEGV, &raw const action, ptr::null_mut());
    }
}

extern "C" fn handler(_signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo; `BEFORE` was initialised before this handler was installed and is not
    // written again. When this returns the access is tried again, and whatever handled the signal before has its turn.
    unsafe {
        let address = (*info).si_addr() as usize;
        let guarded = GUARDED.iter().any(|(start, end)| {
            let start = start.load(Ordering::Acquire);
            start != 0 && start <= address && address < end.load(Ordering::Relaxed)
        });
        if guarded {
            // The process is about to die: there is nobody to tell if this fails.
            let _written = libc::write(2, SENTENCE.as_ptr().cast(), SENTENCE.len());
        }
        libc::sigaction(libc::SIGSEGV, ptr::addr_of!(BEFORE).cast(), ptr::null_mut());
    }
}
