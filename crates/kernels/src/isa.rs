//! Which instruction set the loops run on, and the macro that compiles a loop for each.

use std::{fmt, str::FromStr, sync::OnceLock};

/// An instruction set that every loop is compiled for. Ordered: later ones are wider.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// The baseline of the compilation target (SSE2 on x86-64).
    Scalar,
    /// x86-64 with AVX2.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
}

/// A name that is none of `scalar`, `avx2`, `avx512`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownIsa(pub String);

impl fmt::Display for UnknownIsa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unknown instruction set `{}`, expected one of scalar, avx2, avx512", self.0)
    }
}

impl std::error::Error for UnknownIsa {}

impl FromStr for Isa {
    type Err = UnknownIsa;

    fn from_str(name: &str) -> Result<Self, UnknownIsa> {
        match name {
            "scalar" => Ok(Self::Scalar),
            "avx2" => Ok(Self::Avx2),
            "avx512" => Ok(Self::Avx512),
            _ => Err(UnknownIsa(name.to_owned())),
        }
    }
}

impl Isa {
    /// All of them, narrowest first.
    pub const ALL: [Self; 3] = [Self::Scalar, Self::Avx2, Self::Avx512];

    /// The name used in `DS_ISA`: `scalar`, `avx2`, `avx512`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    /// Whether this machine has it.
    pub fn is_supported(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::Avx512 => false,
        }
    }

    /// Those that this machine has, narrowest first; never empty.
    pub fn supported() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|isa| isa.is_supported())
    }

    /// The widest that this machine has, at most `limit`.
    pub fn at_most(limit: Self) -> Self {
        Self::supported().take_while(|isa| *isa <= limit).last().unwrap_or(Self::Scalar)
    }

    /// The one in use: the widest that this machine has, or less if the environment variable `DS_ISA` names less.
    ///
    /// Decided once per process.
    ///
    /// # Panics
    /// If `DS_ISA` is not the name of an instruction set. Call [`Isa::from_env`] early to get an error instead.
    pub fn active() -> Self {
        static ACTIVE: OnceLock<Isa> = OnceLock::new();
        *ACTIVE.get_or_init(|| match Self::from_env() {
            Ok(isa) => isa,
            Err(unknown) => panic!("environment variable DS_ISA: {unknown}"),
        })
    }

    /// What [`Isa::active`] will decide, with a bad `DS_ISA` as an error.
    ///
    /// # Errors
    /// [`UnknownIsa`] if `DS_ISA` is not the name of an instruction set.
    pub fn from_env() -> Result<Self, UnknownIsa> {
        let limit = match std::env::var_os("DS_ISA") {
            None => Self::Avx512,
            Some(name) if name.is_empty() => Self::Avx512,
            Some(name) => name.to_string_lossy().parse()?,
        };
        Ok(Self::at_most(limit))
    }

    /// Itself, if this machine has it: what makes the calls in `kernel!` sound.
    ///
    /// # Panics
    /// If this machine does not have it.
    #[inline]
    pub(crate) fn checked(self) -> Self {
        assert!(self.is_supported(), "this machine does not have {}", self.name());
        self
    }
}

/// Compiles one loop for every [`Isa`] and makes the function that chooses: `name(isa, arguments...)`.
macro_rules! kernel {
    (
        $(#[$doc:meta])*
        $vis:vis fn $name:ident $(<$($generic:ident : $bound:path),+>)? ($($arg:ident : $ty:ty),* $(,)?)
        $(-> $ret:ty)? $body:block
    ) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments, reason = "one more than the loop, for the instruction set")]
        $vis fn $name $(<$($generic: $bound),+>)? (isa: $crate::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body $(<$($generic: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2")]
            fn avx2 $(<$($generic: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? {
                body $(::<$($generic),+>)? ($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            fn avx512 $(<$($generic: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? {
                body $(::<$($generic),+>)? ($($arg),*)
            }

            match isa.checked() {
                // SAFETY: `checked` established that this machine has AVX2.
                #[cfg(target_arch = "x86_64")]
                $crate::Isa::Avx2 => unsafe { avx2 $(::<$($generic),+>)? ($($arg),*) },
                // SAFETY: `checked` established that this machine has the AVX-512 subsets named above.
                #[cfg(target_arch = "x86_64")]
                $crate::Isa::Avx512 => unsafe { avx512 $(::<$($generic),+>)? ($($arg),*) },
                _ => body $(::<$($generic),+>)? ($($arg),*),
            }
        }
    };
}
pub(crate) use kernel;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for isa in Isa::ALL {
            assert_eq!(isa.name().parse(), Ok(isa));
        }
        assert_eq!(
            "sse9".parse::<Isa>().unwrap_err().to_string(),
            "unknown instruction set `sse9`, expected one of scalar, avx2, avx512"
        );
    }

    #[test]
    fn a_limit_lowers_and_never_raises() {
        assert_eq!(Isa::at_most(Isa::Scalar), Isa::Scalar);
        for limit in Isa::ALL {
            let chosen = Isa::at_most(limit);
            assert!(chosen <= limit && chosen.is_supported());
        }
    }
}
