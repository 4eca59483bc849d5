//! When waiting requests join the answers in progress.
//!
//! A pass with prompts runs one operation at a time, and so takes as long as several passes of single tokens that run as a program, however
//! few its prompts are (on an H200 25 to 40 ms for a model of 7 billion weights, where a program takes 2.5 to 7). Where there are programs,
//! requests therefore join several at a time. What it trades: a request may wait for a few passes though there is room. What it
//! refuses: to let one wait for longer, for a batch that is mostly free, or for others where its own prompt is worth a pass.

/// Passes that a request waits for others at most.
const PASSES: usize = 8;

/// What decides whether requests may join.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Situation {
    /// Answers in progress.
    pub(crate) running: usize,
    /// And how many there may be.
    pub(crate) most: usize,
    /// Passes since the last one with prompts.
    pub(crate) passes: usize,
    /// Tokens of the first prompt in line.
    pub(crate) prompt: usize,
    /// Tokens of prompts in a pass at most.
    pub(crate) chunk: usize,
}

impl Situation {
    /// Whether a pass with prompts is worth it now.
    pub(crate) fn lets_join(self) -> bool {
        let free = self.most.saturating_sub(self.running);
        self.running == 0 || self.passes >= PASSES || 4 * free >= self.most || 2 * self.prompt >= self.chunk
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_wait_for_others_where_a_batch_is_nearly_full_and_not_for_long() {
        let full = Situation { running: 31, most: 32, passes: 0, prompt: 50, chunk: 512 };
        assert!(!full.lets_join());
        assert!(!Situation { passes: PASSES - 1, ..full }.lets_join());
        assert!(Situation { passes: PASSES, ..full }.lets_join());
        assert!(!Situation { running: 25, ..full }.lets_join());
        assert!(Situation { running: 24, ..full }.lets_join(), "a quarter is free");
        assert!(Situation { prompt: 256, ..full }.lets_join(), "half of a pass's prompts");
        assert!(Situation { running: 0, most: 1, ..full }.lets_join());
        assert!(!Situation { running: 1, most: 1, ..full }.lets_join());
    }
}
