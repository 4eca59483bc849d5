//! Linear layers whose rows belong to several adapters.
//!
//! ```text
//! y[i] = x[i] Wᵀ + s · x[i] Aᵀ Bᵀ (+ r[i])      A, B, s: those of the adapter of row i
//! ```
//!
//! Shapes are those of [`qlora_linear`](crate::qlora_linear), whose form without dropout this is: for answering,
//! where the requests of one batch may have chosen different adapters over one base. Rows of one adapter stand
//! together. The frozen product is taken once for all rows. What it refuses: gradients.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};

use crate::qlora_linear::Input;
use crate::{FrozenWeight, KernelBackend, LinearPart, LoraTerm};

/// Rows that follow each other and belong to one adapter.
#[derive(Clone, Debug)]
pub struct RowGroup<B: Backend> {
    /// Their number.
    pub rows: usize,
    /// The correction of each layer, if there is one.
    pub loras: Vec<Option<LoraTerm<B>>>,
}

/// The composition of other operations: x `[n, in]` to `[n, Σ out]`, added to `residual` if there is one.
#[must_use]
pub fn reference<B: KernelBackend>(
    x: Tensor<B, 2>,
    weights: &[FrozenWeight<B>],
    groups: &[RowGroup<B>],
    residual: Option<Tensor<B, 2>>,
) -> Tensor<B, 2> {
    let project = |loras: &[Option<LoraTerm<B>>], residual| {
        let part = |(weight, lora): (&FrozenWeight<B>, &Option<LoraTerm<B>>)| LinearPart {
            weight: weight.clone(),
            lora: lora.clone(),
        };
        let parts: Vec<_> = weights.iter().zip(loras).map(part).collect();
        B::qlora_project(Input { x: x.clone().into(), dropped: x.clone(), residual }, &parts).y
    };
    if let [group] = groups {
        return project(&group.loras, residual);
    }
    let y = project(&vec![None; weights.len()], residual);
    match corrections(&x, weights, groups) {
        Some(corrections) => y + corrections,
        None => y,
    }
}

/// The corrections of all rows `[n, Σ out]`, if any row has one.
fn corrections<B: KernelBackend>(
    x: &Tensor<B, 2>,
    weights: &[FrozenWeight<B>],
    groups: &[RowGroup<B>],
) -> Option<Tensor<B, 2>> {
    if groups.iter().all(|group| group.loras.iter().all(Option::is_none)) {
        return None;
    }
    let (dtype, device): (DType, _) = (x.dtype(), x.device());
    let mut start = 0;
    let mut group_rows = |group: &RowGroup<B>| {
        let x = x.clone().narrow(0, start, group.rows);
        start += group.rows;
        let column = |(weight, lora): (&FrozenWeight<B>, &Option<LoraTerm<B>>)| match lora {
            Some(lora) => lora.forward(x.clone()),
            None => Tensor::zeros([group.rows, weight.dims()[0]], (&device, dtype)),
        };
        Tensor::cat(weights.iter().zip(&group.loras).map(column).collect(), 1)
    };
    Some(Tensor::cat(groups.iter().map(&mut group_rows).collect(), 0))
}

#[cfg(test)]
mod tests {
    use burn_flex::Flex;

    use super::*;
    use crate::Nf4Tensor;
    use crate::testing::{close, noise, noisy};

    const INNER: usize = 24;
    const OUTS: [usize; 2] = [10, 6];

    fn weights() -> Vec<FrozenWeight<Flex>> {
        let packed = Nf4Tensor::quantize(&noise(10 * INNER, 1), [10, INNER], true, &Default::default());
        vec![FrozenWeight::Nf4(packed), FrozenWeight::Dense(noisy([6, INNER], 2))]
    }

    fn lora(out: usize, rank: usize, seed: u64) -> LoraTerm<Flex> {
        LoraTerm { a: noisy([rank, INNER], seed), b: noisy([out, rank], seed + 1), scale: 0.5 }
    }

    #[test]
    fn each_group_gets_what_it_gets_alone() {
        let groups = [
            RowGroup { rows: 2, loras: vec![Some(lora(OUTS[0], 3, 10)), None] },
            RowGroup { rows: 1, loras: vec![None, None] },
            RowGroup { rows: 3, loras: vec![Some(lora(OUTS[0], 5, 20)), Some(lora(OUTS[1], 5, 30))] },
        ];
        let x = noisy::<Flex, 2>([6, INNER], 5);
        let residual = noisy::<Flex, 2>([6, 16], 6);
        let together = reference(x.clone(), &weights(), &groups, Some(residual.clone()));
        let mut start = 0;
        for group in &groups {
            let some = |all: &Tensor<Flex, 2>| all.clone().narrow(0, start, group.rows);
            let alone = reference(some(&x), &weights(), std::slice::from_ref(group), Some(some(&residual)));
            close(some(&together), alone, 1e-6);
            start += group.rows;
        }
    }

    #[test]
    fn without_corrections_only_the_base_is_multiplied() {
        let none = |rows| RowGroup { rows, loras: vec![None, None] };
        let x = noisy::<Flex, 2>([5, INNER], 5);
        let one = reference(x.clone(), &weights(), &[none(5)], None);
        close(reference(x, &weights(), &[none(2), none(3)], None), one, 1e-6);
    }
}
