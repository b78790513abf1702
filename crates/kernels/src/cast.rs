//! Casts between dtypes.

use deepspeed_core::{Span, SpanMut};

use crate::{Isa, element::Element, isa::kernel};

/// Converts `src` into the dtype of `dst`: to nearest, ties to even, too large to infinity. Equal dtypes are
/// copied byte by byte; otherwise any NaN becomes the canonical positive one when narrowing to 16 bits.
///
/// # Panics
/// If the lengths differ.
pub fn cast(src: Span<'_>, dst: SpanMut<'_>) {
    cast_on(Isa::active(), src, dst);
}

/// [`cast`] on a given instruction set.
///
/// # Panics
/// If the lengths differ or this machine does not have `isa`.
pub fn cast_on(isa: Isa, src: Span<'_>, mut dst: SpanMut<'_>) {
    assert_eq!(src.len(), dst.len(), "cast of spans of different length");
    if src.dtype() == dst.dtype() {
        dst.as_bytes_mut().copy_from_slice(src.as_bytes());
        return;
    }
    if let Some(src) = src.as_f32() {
        cast_from(isa, src, &mut dst);
    } else if let Some(src) = src.as_f16() {
        cast_from(isa, src, &mut dst);
    } else if let Some(src) = src.as_bf16() {
        cast_from(isa, src, &mut dst);
    }
}

fn cast_from<S: Element>(isa: Isa, src: &[S], dst: &mut SpanMut<'_>) {
    if let Some(dst) = dst.as_f32_mut() {
        convert(isa, src, dst);
    } else if let Some(dst) = dst.as_f16_mut() {
        convert(isa, src, dst);
    } else if let Some(dst) = dst.as_bf16_mut() {
        convert(isa, src, dst);
    }
}

kernel! {
    /// Element by element through fp32.
    fn convert<S: Element, D: Element>(src: &[S], dst: &mut [D]) {
        for (dst, src) in dst.iter_mut().zip(src) {
            *dst = D::from_f32(src.to_f32());
        }
    }
}

/// `src` as fp32: itself, or widened into `scratch`.
///
/// # Panics
/// If `src` is longer than `scratch` and not fp32.
pub(crate) fn widened<'a>(isa: Isa, src: Span<'a>, scratch: &'a mut [f32]) -> &'a [f32] {
    match src.as_f32() {
        Some(src) => src,
        None => {
            let scratch = &mut scratch[..src.len()];
            cast_on(isa, src, SpanMut::from(&mut *scratch));
            scratch
        }
    }
}
