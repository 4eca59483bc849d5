//! Programs for passes of single tokens, by adapter.
//!
//! A program is made when it is first wanted, and what it needs for so many rows when so many first run. What fails then has
//! touched no page, so the pass runs one operation at a time instead, and so does every later one with the adapter.

use std::collections::BTreeMap;

use burn::tensor::backend::Backend;
use buzzer_kernels::{StepError, StepRunner};

/// The programs of an engine, or why there are none.
#[derive(Debug)]
pub(crate) struct Steps<B: Backend> {
    by_adapter: BTreeMap<usize, Result<Box<dyn StepRunner<B>>, StepError>>,
}

impl<B: Backend> Default for Steps<B> {
    fn default() -> Self {
        Self { by_adapter: BTreeMap::new() }
    }
}

impl<B: Backend> Steps<B> {
    /// Whether an adapter's program is ready for so many rows; `make` makes it if that has not been tried.
    pub(crate) fn prepare(
        &mut self,
        adapter: usize,
        rows: usize,
        make: impl FnOnce() -> Result<Box<dyn StepRunner<B>>, StepError>,
    ) -> bool {
        let program = self.by_adapter.entry(adapter).or_insert_with(make);
        let prepared = match program {
            Ok(runner) if rows <= runner.most_rows() => runner.prepare(rows),
            _ => return false,
        };
        let ready = prepared.is_ok();
        if let Err(error) = prepared {
            *program = Err(error);
        }
        ready
    }

    /// An adapter's program, if there is one.
    pub(crate) fn get(&mut self, adapter: usize) -> Option<&mut dyn StepRunner<B>> {
        match self.by_adapter.get_mut(&adapter) {
            Some(Ok(runner)) => Some(runner.as_mut()),
            _ => None,
        }
    }

    /// Kernels that a step with the adapter launches, if it has a program.
    pub(crate) fn launches(&self, adapter: usize) -> Result<Option<usize>, &StepError> {
        self.by_adapter
            .get(&adapter)
            .map(|program| program.as_ref().map(|runner| runner.launches()))
            .transpose()
    }

    /// What a device refused though there are kernels for it.
    pub(crate) fn refusal(&self) -> Option<&StepError> {
        let errors = self.by_adapter.values().filter_map(|program| program.as_ref().err());
        errors.into_iter().find(|error| matches!(error, StepError::Refused(_)))
    }

    /// Lets go of all programs and with them of the pages that they hold.
    pub(crate) fn drop_programs(&mut self) {
        self.by_adapter.retain(|_, program| program.is_err());
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Tensor;
    use burn_flex::Flex;
    use buzzer_kernels::StepRow;

    use super::*;

    /// A program for at most eight rows whose device compiles kernels for four.
    #[derive(Debug)]
    struct Fake;

    impl StepRunner<Flex> for Fake {
        fn most_rows(&self) -> usize {
            8
        }

        fn launches(&self) -> usize {
            5
        }

        fn prepare(&mut self, rows: usize) -> Result<(), StepError> {
            if rows > 4 { Err(StepError::Refused(format!("no kernels for {rows}"))) } else { Ok(()) }
        }

        fn run(&mut self, rows: &[StepRow]) -> Result<Vec<Option<u32>>, StepError> {
            Ok(vec![None; rows.len()])
        }

        fn logits(&self) -> Tensor<Flex, 2> {
            Tensor::zeros([0, 1], &Default::default())
        }
    }

    fn fake() -> Result<Box<dyn StepRunner<Flex>>, StepError> {
        Ok(Box::new(Fake))
    }

    fn not_again() -> Result<Box<dyn StepRunner<Flex>>, StepError> {
        panic!("a program is made once")
    }

    #[test]
    fn a_program_is_made_once_and_kept_for_the_rows_it_can_run() {
        let mut steps = Steps::default();
        assert_eq!(steps.launches(3), Ok(None));
        assert!(steps.prepare(3, 2, fake));
        assert!(steps.prepare(3, 4, not_again));
        assert!(!steps.prepare(3, 9, not_again), "more rows than it has room for");
        assert!(steps.get(3).is_some() && steps.get(0).is_none());
        assert_eq!((steps.launches(3), steps.refusal()), (Ok(Some(5)), None));
        steps.drop_programs();
        assert!(steps.get(3).is_none());
        assert!(steps.prepare(3, 1, fake));
    }

    #[test]
    fn a_size_that_the_device_refuses_ends_the_program_and_is_told() {
        let mut steps = Steps::default();
        assert!(steps.prepare(0, 4, fake));
        assert!(!steps.prepare(0, 5, not_again));
        assert!(!steps.prepare(0, 4, not_again), "one by one from then on");
        let refusal = StepError::Refused("no kernels for 5".into());
        assert_eq!(steps.refusal(), Some(&refusal));
        steps.drop_programs();
        assert_eq!(steps.refusal(), Some(&refusal));
    }

    #[test]
    fn a_device_without_programs_has_refused_nothing() {
        let mut steps = Steps::<Flex>::default();
        assert!(!steps.prepare(0, 1, || Err(StepError::Unsupported("one by one".into()))));
        assert_eq!(steps.refusal(), None);
        assert!(steps.launches(0).is_err());
    }
}
