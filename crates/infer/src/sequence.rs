//! One request on its way.

use std::time::Instant;

use buzzer_kernels::{ChosenToken, PagedSequence, TokenChoice};

use crate::pages::{Chapter, PagePool};
use crate::sampling::log_probs;
use crate::text::{AnswerText, Piece};
use crate::{Event, FinishReason, InferError, LogProb, Request, RequestId, Usage};

/// A request, its tokens, and where their keys and values lie.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) id: RequestId,
    pub(crate) request: Request,
    pub(crate) adapter: usize,
    /// Prompt and answer.
    pub(crate) tokens: Vec<u32>,
    /// Tokens it has at most.
    pub(crate) limit: usize,
    text: Option<AnswerText>,
    /// Of the token that ended it.
    end_log_prob: Option<LogProb>,
    /// Tokens whose keys and values are in the pages, or will be after this pass.
    computed: usize,
    cached: usize,
    pages: Vec<u32>,
    /// Pages that it may still take.
    promised: usize,
    /// The end of its last whole page.
    chapter: Chapter,
    whole_pages: usize,
}

/// A sequence's next token.
#[derive(Clone, Debug)]
pub(crate) struct Choice {
    pub(crate) token: u32,
    pub(crate) log_prob: Option<LogProb>,
}

impl Sequence {
    pub(crate) fn new(
        id: RequestId,
        request: Request,
        adapter: usize,
        limit: usize,
        text: Option<AnswerText>,
    ) -> Self {
        Self {
            id,
            tokens: request.prompt.clone(),
            request,
            adapter,
            limit,
            text,
            end_log_prob: None,
            computed: 0,
            cached: 0,
            pages: Vec::new(),
            promised: 0,
            chapter: Chapter::Start { adapter },
            whole_pages: 0,
        }
    }

    /// Tokens that are known and not computed.
    pub(crate) fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    pub(crate) fn usage(&self) -> Usage {
        let prompt_tokens = self.request.prompt.len();
        Usage { prompt_tokens, cached_tokens: self.cached, new_tokens: self.new_tokens() }
    }

    pub(crate) fn is_late(&self, now: Instant) -> bool {
        self.request.deadline.is_some_and(|deadline| deadline <= now)
    }

    /// Holds the pages that others have filled with the prompt's beginning, and sets aside all others that it can
    /// need; says whether there were as many. The prompt's last token is always computed, since the first logits
    /// come from it.
    pub(crate) fn start(&mut self, pool: &mut PagePool, page_tokens: usize) -> bool {
        let shareable = &self.tokens[..self.tokens.len() - 1];
        let (mut chapter, mut found) = (self.chapter, Vec::new());
        for tokens in shareable.chunks_exact(page_tokens) {
            let Some((page, end)) = pool.find(chapter, tokens) else { break };
            found.push(page);
            chapter = end;
        }
        let new = pages_for(self.limit, page_tokens) - found.len();
        let idle = found.iter().filter(|&&page| pool.is_idle(page)).count();
        if !pool.promise(new + idle) {
            return false;
        }
        found.iter().for_each(|&page| pool.hold(page));
        self.computed = found.len() * page_tokens;
        (self.cached, self.whole_pages) = (self.computed, found.len());
        (self.pages, self.promised, self.chapter) = (found, new, chapter);
        true
    }

    /// Plans the next tokens of this sequence: takes pages for them and publishes those that become full.
    ///
    /// A page is published before it is computed. Whoever finds it computes later tokens in the same pass or in a
    /// later one, and a pass stores the keys of all its rows before it reads any.
    pub(crate) fn plan(&mut self, rows: usize, pool: &mut PagePool, page_tokens: usize) -> PagedSequence {
        self.computed += rows;
        while self.pages.len() * page_tokens < self.computed {
            self.pages.push(pool.take());
            self.promised -= 1;
        }
        while (self.whole_pages + 1) * page_tokens <= self.computed {
            let tokens = &self.tokens[self.whole_pages * page_tokens..][..page_tokens];
            self.chapter = pool.publish(self.pages[self.whole_pages], self.chapter, tokens);
            self.whole_pages += 1;
        }
        PagedSequence { pages: self.pages.clone(), length: self.computed, rows }
    }

    /// Gives up all pages. The later ones become idle first, because without those before them they are of no use.
    pub(crate) fn leave(&mut self, pool: &mut PagePool) {
        pool.forgo(std::mem::take(&mut self.promised));
        std::mem::take(&mut self.pages).into_iter().rev().for_each(|page| pool.release(page));
    }

    /// Its pages that nobody else holds, none of which is published any more: what is in them is not to be trusted.
    pub(crate) fn distrust(&mut self, pool: &mut PagePool) -> Vec<u32> {
        self.pages.iter().for_each(|&page| pool.withdraw(page));
        self.pages.iter().copied().filter(|&page| pool.holders(page) == 1).collect()
    }

    /// Whether its next token is the likeliest one, and nobody wants to know more than how likely it is.
    pub(crate) fn takes_likeliest(&self) -> bool {
        self.request.sampling.is_argmax() && !self.needs_all_logits()
    }

    /// Whether choosing its next token takes more of its logits than [`Self::token_choice`] says.
    pub(crate) fn needs_all_logits(&self) -> bool {
        self.request.sampling.penalizes() || self.request.log_probs.is_some_and(|top| top > 0)
    }

    /// How its next token is chosen where the logits lie.
    pub(crate) fn token_choice(&self) -> TokenChoice {
        let log_prob = self.request.log_probs.is_some();
        TokenChoice { log_prob, ..self.request.sampling.token_choice(self.new_tokens()) }
    }

    /// What was chosen there, and how likely it was if that was asked for.
    pub(crate) fn taken(&self, chosen: ChosenToken) -> Choice {
        let log_prob = |chosen| LogProb { chosen, top: Vec::new() };
        let wanted = chosen.log_prob.filter(|_| self.request.log_probs.is_some());
        Choice { token: chosen.id, log_prob: wanted.map(log_prob) }
    }

    /// Chooses the next token from its logits `[v]`; `None` if one of them is no number.
    pub(crate) fn choose(&self, logits: &[f32]) -> Option<Choice> {
        let token = self.request.sampling.choose(logits, &self.tokens, self.new_tokens())?;
        Some(Choice { token, log_prob: self.request.log_probs.map(|top| log_probs(logits, token, top)) })
    }

    fn new_tokens(&self) -> usize {
        self.tokens.len() - self.request.prompt.len()
    }

    /// Takes its next token; gives the reason if that was the end.
    pub(crate) fn advance(
        &mut self,
        choice: Option<Choice>,
        end: Option<u32>,
        events: &mut Vec<Event>,
    ) -> Result<Option<FinishReason>, InferError> {
        let Some(Choice { token, log_prob }) = choice else { return Ok(Some(FinishReason::NotANumber)) };
        let ends = end == Some(token) && !self.request.ignore_end;
        if ends || self.request.stop_tokens.contains(&token) {
            self.end_log_prob = log_prob;
            return Ok(Some(FinishReason::Stop));
        }
        self.tokens.push(token);
        let Piece { text, stop } = match &mut self.text {
            Some(text) => text.push(token)?,
            None => Piece::default(),
        };
        events.push(Event::Token { request: self.id, token, text, log_prob });
        let full = (self.tokens.len() == self.limit).then_some(FinishReason::Length);
        Ok(stop.map(FinishReason::StopString).or(full))
    }

    /// The last event. Text that was held back comes out, unless it is a stop string's.
    pub(crate) fn finish(&mut self, reason: FinishReason) -> Result<Event, InferError> {
        let stopped = matches!(reason, FinishReason::StopString(_));
        let piece = match &mut self.text {
            Some(text) if !stopped => text.finish()?,
            _ => Piece::default(),
        };
        let reason = piece.stop.map_or(reason, FinishReason::StopString);
        let log_prob = self.end_log_prob.take();
        Ok(Event::Finished { request: self.id, reason, text: piece.text, log_prob, usage: self.usage() })
    }
}

/// Pages for a sequence of so many tokens at most. Its last token ends it and is not computed.
pub(crate) fn pages_for(limit: usize, page_tokens: usize) -> usize {
    (limit - 1).div_ceil(page_tokens)
}
