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
    /// Rows of one step, if an adapter's program is ready for so many in steps that are as large as can be; `make` makes it if that has
    /// not been tried.
    pub(crate) fn prepare(
        &mut self,
        adapter: usize,
        rows: usize,
        make: impl FnOnce() -> Result<Box<dyn StepRunner<B>>, StepError>,
    ) -> Option<usize> {
        let program = self.by_adapter.entry(adapter).or_insert_with(make);
        let runner = program.as_mut().ok()?;
        let most = rows.min(runner.most_rows()).max(1);
        let mut sizes = [most, rows % most].into_iter().filter(|&rows| rows > 0);
        let prepared = sizes.try_for_each(|rows| runner.prepare(rows));
        if let Err(error) = prepared {
            *program = Err(error);
            return None;
        }
        Some(most)
    }

    /// An adapter's program.
    ///
    /// # Errors
    /// If it was not prepared.
    pub(crate) fn get(&mut self, adapter: usize) -> Result<&mut dyn StepRunner<B>, StepError> {
        match self.by_adapter.get_mut(&adapter) {
            Some(Ok(runner)) => Ok(runner.as_mut()),
            Some(Err(error)) => Err(error.clone()),
            None => Err(StepError::Unsupported(format!("adapter {adapter} has no program"))),
        }
    }

    /// Whether there is a program.
    pub(crate) fn any(&self) -> bool {
        self.by_adapter.values().any(Result::is_ok)
    }

    /// Lets every program's next step run after what was asked of the device until now.
    pub(crate) fn follow(&mut self) {
        self.by_adapter.values_mut().flatten().for_each(|runner| runner.follow());
    }

    /// Kernels that a pass over so many rows with the adapter launches, if it has a program.
    pub(crate) fn launches(&self, adapter: usize, rows: usize) -> Result<Option<usize>, &StepError> {
        let Some(program) = self.by_adapter.get(&adapter) else { return Ok(None) };
        let runner = program.as_ref()?;
        Ok(Some(runner.launches() * rows.div_ceil(runner.most_rows().max(1))))
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
    use buzzer_kernels::{ChosenToken, StepRow};

    use super::*;

    /// A program for at most eight rows whose device compiles kernels for four.
    #[derive(Debug)]
    struct Fake;

    impl StepRunner<Flex> for Fake {
        fn most_rows(&self) -> usize {
            4
        }

        fn launches(&self) -> usize {
            5
        }

        fn prepare(&mut self, rows: usize) -> Result<(), StepError> {
            if rows == 3 { Err(StepError::Refused(format!("no kernels for {rows}"))) } else { Ok(()) }
        }

        fn follow(&mut self) {}

        fn run(&mut self, rows: &[StepRow]) -> Result<Vec<Option<ChosenToken>>, StepError> {
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
        assert_eq!(steps.launches(3, 1), Ok(None));
        assert_eq!(steps.prepare(3, 2, fake), Some(2));
        assert_eq!(steps.prepare(3, 4, not_again), Some(4));
        assert_eq!(
            steps.prepare(3, 10, not_again),
            Some(4),
            "more rows than it has room for go in several steps"
        );
        assert!(steps.get(3).is_ok() && steps.get(0).is_err());
        assert_eq!((steps.launches(3, 4), steps.refusal()), (Ok(Some(5)), None));
        assert_eq!(steps.launches(3, 9), Ok(Some(15)));
        steps.drop_programs();
        assert!(steps.get(3).is_err());
        assert_eq!(steps.prepare(3, 1, fake), Some(1));
    }

    #[test]
    fn a_size_that_the_device_refuses_ends_the_program_and_is_told() {
        let mut steps = Steps::default();
        assert_eq!(steps.prepare(0, 4, fake), Some(4));
        assert_eq!(steps.prepare(0, 7, not_again), None, "three of them are in a step of their own");
        assert_eq!(steps.prepare(0, 4, not_again), None, "one by one from then on");
        let refusal = StepError::Refused("no kernels for 3".into());
        assert_eq!(steps.refusal(), Some(&refusal));
        steps.drop_programs();
        assert_eq!(steps.refusal(), Some(&refusal));
    }

    #[test]
    fn a_device_without_programs_has_refused_nothing() {
        let mut steps = Steps::<Flex>::default();
        assert_eq!(steps.prepare(0, 1, || Err(StepError::Unsupported("one by one".into()))), None);
        assert_eq!(steps.refusal(), None);
        assert!(steps.launches(0, 1).is_err());
    }
}
