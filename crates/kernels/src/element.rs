//! Conversions between the element types, in arithmetic that every instruction set does alike.
//!
//! Branch-free selections over integer arithmetic, which the compiler turns into vector code. They do not depend
//! on the processor's flush-to-zero mode for any 16-bit input.

use half::{bf16, f16};

/// An element that has an fp32 value.
pub(crate) trait Element: Copy {
    /// The same value in fp32: exact.
    fn to_f32(self) -> f32;

    /// The nearest value, ties to even; too large is infinity; any NaN is the canonical one with positive sign.
    fn from_f32(value: f32) -> Self;
}

impl Element for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let nan = bits & 0x7fff_ffff > 0x7f80_0000;
        Self::from_bits(if nan { 0x7fc0 } else { rounded as u16 })
    }
}

/// Difference of the exponent biases of binary32 and binary16, in place in a binary32.
const BIAS: u32 = (127 - 15) << 23;

impl Element for f16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        let bits = u32::from(self.to_bits());
        let magnitude = bits & 0x7fff;
        let normal = (magnitude << 13).wrapping_add(BIAS);
        let special = (magnitude << 13) | 0x7f80_0000;
        // A subnormal is a whole number of 2^-24; the product is a normal binary32.
        let subnormal = (magnitude as i32 as f32 * f32::from_bits((127 - 24) << 23)).to_bits();
        let finite = if magnitude < 0x0400 { subnormal } else { normal };
        let value = if magnitude >= 0x7c00 { special } else { finite };
        f32::from_bits(value | (bits & 0x8000) << 16)
    }

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        let bits = value.to_bits();
        let magnitude = bits & 0x7fff_ffff;
        let normal = magnitude.wrapping_sub(BIAS).wrapping_add(0x0fff + ((magnitude >> 13) & 1)) >> 13;
        // Below 2^-14 a binary16 counts in 2^-24, which is also the spacing of binary32 above one half: the
        // addition rounds as wanted.
        let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
        let finite = if magnitude < 0x3880_0000 { subnormal } else { normal };
        let limited = if magnitude >= 0x4780_0000 { 0x7c00 } else { finite };
        let signed = limited | (bits >> 16) & 0x8000;
        Self::from_bits(if magnitude > 0x7f80_0000 { 0x7e00 } else { signed as u16 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// binary32 patterns around every place where rounding to 16 bits decides something.
    fn interesting() -> impl Iterator<Item = f32> {
        (0..=0xffff_u32).flat_map(|high| {
            [0, 1, 0x0fff, 0x1000, 0x1001, 0x1fff, 0x2000, 0x3000, 0x7fff, 0x8000, 0x8001, 0xf000, 0xffff]
                .map(|low| f32::from_bits(high << 16 | low))
        })
    }

    #[test]
    fn every_half_is_exact_in_fp32() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (f16::from_bits(bits).to_f32(), f16::from_bits(bits));
            if theirs.is_nan() {
                assert!(Element::to_f32(theirs).is_nan(), "{bits:#06x}");
            } else {
                assert_eq!(Element::to_f32(theirs).to_bits(), ours.to_bits(), "{bits:#06x}");
                assert_eq!(<f16 as Element>::from_f32(ours).to_bits(), bits);
            }
            let brain = bf16::from_bits(bits);
            if brain.is_nan() {
                assert!(Element::to_f32(brain).is_nan(), "{bits:#06x}");
            } else {
                assert_eq!(Element::to_f32(brain).to_bits(), brain.to_f32().to_bits());
                assert_eq!(<bf16 as Element>::from_f32(brain.to_f32()).to_bits(), bits);
            }
        }
    }

    #[test]
    fn rounding_agrees_with_the_half_crate() {
        for value in interesting() {
            let (half, brain) = (<f16 as Element>::from_f32(value), <bf16 as Element>::from_f32(value));
            if value.is_nan() {
                assert_eq!((half.to_bits(), brain.to_bits()), (0x7e00, 0x7fc0));
            } else {
                assert_eq!(half.to_bits(), f16::from_f32(value).to_bits(), "{:#010x}", value.to_bits());
                assert_eq!(brain.to_bits(), bf16::from_f32(value).to_bits(), "{:#010x}", value.to_bits());
            }
        }
    }
}
