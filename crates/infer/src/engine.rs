//! Many requests at once over one model.
//!
//! Each [`Engine::step`] is one pass over the model: one row for every answer in progress, and beside them up to
//! `prefill_chunk` rows of prompts, in the order in which they came. Requests join when there is room and leave
//! when they end, at any step; where single tokens run as programs they join several at a time, because a pass with prompts is slower
//! then. A request begins only when the pages of its longest possible answer can be set
//! aside, so that none has to be put back once it has begun; until then it waits, and the first in line is never
//! overtaken. What it trades: an answer that ends early held room that another could have begun in; in return
//! nothing is computed twice, and no request is lost or slowed down by a later one. What it refuses: a request that
//! would not fit alone.
//!
//! Greedy answers do not depend on what else is in the batch, but for rounding: a device may add the terms of a
//! product in another order when it multiplies more rows.

use std::collections::VecDeque;
use std::time::Instant;

use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor, TensorData};
use buzzer_kernels::{
    ChosenToken, KernelBackend, PagedIndex, PagedSequence, SCRATCH_PAGE, StepError, StepRow, TokenChoice,
    host_floats,
};
use buzzer_model::{AdapterRows, Llama, LoraSet, PagedCache, PagedPass};
use buzzer_text::Tokenizer;
use rayon::prelude::*;

use crate::joining::Situation;
use crate::pages::PagePool;
use crate::sequence::{Choice, Sequence, pages_for};
use crate::steps::Steps;
use crate::stream::Stream;
use crate::text::AnswerText;
use crate::{Answer, CacheDtype, EngineSettings, Event, FinishReason, InferError, Request, RequestId, Usage};

/// How full an engine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Requests that have not begun.
    pub waiting: usize,
    /// Answers in progress.
    pub running: usize,
    /// Pages of the cache that requests can hold.
    pub pages: usize,
    /// Pages that requests hold.
    pub pages_held: usize,
    /// Pages that nobody holds and that are promised to nobody.
    pub pages_available: usize,
}

/// A model that answers many requests at once.
#[derive(Debug)]
pub struct Engine<B: Backend> {
    model: Llama<B>,
    tokenizer: Option<Tokenizer>,
    settings: EngineSettings,
    cache: PagedCache<B>,
    pool: PagePool,
    /// Whether the device keeps memory by exact size.
    few_sizes: bool,
    /// The model's own corrections first.
    adapters: Vec<(String, LoraSet<B>)>,
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    steps: Steps<B>,
    /// Passes since the last one with prompts.
    passes: usize,
    /// Events that are not given out yet.
    events: VecDeque<Event>,
    requests: u64,
}

/// Rows of one running sequence in a pass.
struct Planned {
    /// Its place among the running ones.
    place: usize,
    adapter: usize,
    ids: Vec<u32>,
    sequence: PagedSequence,
    /// Whether its next token can be chosen after the pass.
    complete: bool,
    /// Whether it may list pages that others fill in this pass, because it has just begun.
    begins: bool,
}

impl<B: KernelBackend> Engine<B> {
    /// An engine without text: answers are token ids, and stop strings are refused. See [`Self::with_tokenizer`].
    ///
    /// # Errors
    /// If a setting is 0, or the budget does not hold two pages.
    pub fn new(model: Llama<B>, mut settings: EngineSettings) -> Result<Self, InferError> {
        settings.check()?;
        let config = model.config();
        let format = settings.cache_dtype.format(model.dtype());
        let page = PagedCache::<B>::page_bytes(config, settings.page_tokens, format);
        let budget = settings.budget_bytes;
        let own = model.lora_set().cast(model.dtype());
        let program = || B::step_bytes(&model.step_program(&own, settings.page_tokens, format));
        let program = if settings.step_programs { program() } else { 0 };
        // Pages come first: without a program answers are slower, and without pages there are none.
        settings.step_programs &= budget.saturating_sub(program) >= 2 * page;
        let program = if settings.step_programs { program } else { 0 };
        let useful = settings.max_batch * pages_for(config.max_position_embeddings, settings.page_tokens) + 1;
        let pages = ((budget - program) / page).min(useful);
        if pages < 2 {
            return Err(InferError::BudgetTooSmall { budget, page });
        }
        let cache = PagedCache::new(config, pages, settings.page_tokens, format, &model.device());
        Ok(Self {
            adapters: vec![(String::new(), own)],
            few_sizes: B::card(&model.device()).is_some(),
            model,
            tokenizer: None,
            settings,
            cache,
            pool: PagePool::new(pages),
            waiting: VecDeque::new(),
            running: Vec::new(),
            steps: Steps::default(),
            passes: 0,
            events: VecDeque::new(),
            requests: 0,
        })
    }

    /// Bytes of the device that a program of single tokens with a model's own corrections takes, so that a budget can hold
    /// it beside the pages; 0 where there is none.
    #[must_use]
    pub fn step_bytes(model: &Llama<B>, page_tokens: usize, cache_dtype: CacheDtype) -> usize {
        let (loras, format) = (model.lora_set().cast(model.dtype()), cache_dtype.format(model.dtype()));
        B::step_bytes(&model.step_program(&loras, page_tokens, format))
    }

    /// The same with text; answers end at the tokenizer's end token.
    #[must_use]
    pub fn with_tokenizer(self, tokenizer: Tokenizer) -> Self {
        Self { tokenizer: Some(tokenizer), ..self }
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> &Llama<B> {
        &self.model
    }

    /// Lets requests choose these corrections by name; [`LoraSet::none`] is the base alone.
    ///
    /// # Errors
    /// If they are for another number of blocks or weights of other shapes, or the name is taken.
    pub fn add_adapter(&mut self, name: impl Into<String>, loras: LoraSet<B>) -> Result<(), InferError> {
        let (name, found) = (name.into(), loras.layers());
        let needed = self.model.blocks.len();
        if found != needed {
            return Err(InferError::AdapterMisfit { name, found, needed });
        }
        for (layer, target, found) in loras.shapes() {
            let expected = self.model.config().linear_shape(target);
            if found != expected {
                return Err(InferError::AdapterShape { name, layer, target, found, expected });
            }
        }
        if name.is_empty() || self.adapters.iter().any(|(other, _)| *other == name) {
            let choose = "a name that no other adapter of this engine has";
            return Err(InferError::Setting { flag: "adapter", found: format!("`{name}`"), choose });
        }
        self.adapters.push((name, loras.cast(self.model.dtype())));
        Ok(())
    }

    /// Takes a request in. It runs when there is room.
    ///
    /// # Errors
    /// If the prompt is empty, leaves no room for an answer in the model's context, or has a token that the model
    /// does not know; if a setting makes no sense, or the adapter is unknown; if the cache could not hold the
    /// request alone; or if it has stop strings and there is no tokenizer.
    pub fn submit(&mut self, request: Request) -> Result<RequestId, InferError> {
        let (adapter, limit) = self.check(&request)?;
        let id = RequestId(self.requests);
        self.requests += 1;
        if request.max_new_tokens == 0 {
            let usage = Usage { prompt_tokens: request.prompt.len(), ..Usage::default() };
            let (reason, text) = (FinishReason::Length, String::new());
            let event = Event::Finished { request: id, reason, text, log_prob: None, usage };
            self.events.push_back(event);
            return Ok(id);
        }
        let text = self.tokenizer.as_ref().map(|tokenizer| AnswerText::new(tokenizer, &request.stop_strings));
        self.waiting.push_back(Sequence::new(id, request, adapter, limit, text));
        Ok(id)
    }

    /// The adapter's number, and how many tokens prompt and answer have at most.
    fn check(&self, request: &Request) -> Result<(usize, usize), InferError> {
        request.sampling.check()?;
        let config = self.model.config();
        let (tokens, context, vocab) =
            (request.prompt.len(), config.max_position_embeddings, config.vocab_size);
        if tokens == 0 {
            return Err(InferError::EmptyPrompt);
        }
        if tokens >= context {
            return Err(InferError::PromptTooLong { tokens, context });
        }
        if let Some(place) = request.prompt.iter().position(|&token| token as usize >= vocab) {
            return Err(InferError::UnknownToken { token: request.prompt[place], place, vocab });
        }
        if self.tokenizer.is_none() && !request.stop_strings.is_empty() {
            return Err(InferError::NoTokenizer);
        }
        if request.stop_strings.iter().any(String::is_empty) {
            let choose = "a text of one character or more";
            return Err(InferError::Setting { flag: "stop string", found: "``".into(), choose });
        }
        let limit = tokens.saturating_add(request.max_new_tokens).min(context);
        let (needed, pages) = (pages_for(limit, self.settings.page_tokens), self.pool.capacity());
        if needed > pages {
            return Err(InferError::TooLarge { prompt: tokens, new: limit - tokens, needed, pages });
        }
        Ok((self.adapter(request.adapter.as_deref())?, limit))
    }

    fn adapter(&self, name: Option<&str>) -> Result<usize, InferError> {
        let Some(name) = name else { return Ok(0) };
        let named = self.adapters.iter().skip(1);
        let found = named.clone().position(|(other, _)| other == name);
        found.map(|place| place + 1).ok_or_else(|| {
            let known: Vec<_> = named.map(|(name, _)| name.as_str()).collect();
            let known = if known.is_empty() { "none".into() } else { known.join(", ") };
            InferError::UnknownAdapter { name: name.to_owned(), known }
        })
    }

    /// Ends a request; its last event comes with the next step. Does nothing if it has ended.
    ///
    /// # Errors
    /// If held-back text cannot be decoded.
    pub fn cancel(&mut self, request: RequestId) -> Result<(), InferError> {
        self.end_those(FinishReason::Cancelled, |sequence| sequence.id == request)
    }

    /// Whether there is nothing to do and nothing to tell.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty() && self.events.is_empty()
    }

    /// How full it is.
    #[must_use]
    pub fn load(&self) -> Load {
        Load {
            waiting: self.waiting.len(),
            running: self.running.len(),
            pages: self.pool.capacity(),
            pages_held: self.pool.held(),
            pages_available: self.pool.available(),
        }
    }

    /// One pass over the model; gives what happened since the last step.
    ///
    /// # Errors
    /// If a token cannot be decoded.
    pub fn step(&mut self) -> Result<Vec<Event>, InferError> {
        let now = Instant::now();
        self.end_those(FinishReason::Deadline, |sequence| sequence.is_late(now))?;
        let plan = self.plan();
        match self.steps_of(&plan) {
            Some(steps) => self.run_steps(&steps, plan)?,
            None if plan.is_empty() => {}
            None => self.run(plan)?,
        }
        Ok(self.events.drain(..).collect())
    }

    /// Takes requests in, runs until they have ended, and gives their answers in order; `on_event` hears of all
    /// events, with the place of the request. What other requests tell meanwhile comes with the next step.
    ///
    /// # Errors
    /// As [`Self::submit`] and [`Self::step`]; then none of these requests is left in the engine.
    pub fn complete(
        &mut self,
        requests: impl IntoIterator<Item = Request>,
        mut on_event: impl FnMut(usize, &Event),
    ) -> Result<Vec<Answer>, InferError> {
        let first = self.requests;
        let mut others = Vec::new();
        let answers = self.run_to_the_end(requests, first, &mut others, &mut on_event);
        self.events.extend(others);
        if answers.is_err() {
            (first..self.requests).for_each(|number| self.forget(RequestId(number)));
        }
        answers
    }

    /// [`Self::complete`] for requests from number `first` on; what others tell goes to `others`.
    fn run_to_the_end(
        &mut self,
        requests: impl IntoIterator<Item = Request>,
        first: u64,
        others: &mut Vec<Event>,
        on_event: &mut impl FnMut(usize, &Event),
    ) -> Result<Vec<Answer>, InferError> {
        requests.into_iter().try_for_each(|request| self.submit(request).map(drop))?;
        let ours = first..self.requests;
        let mut answers = vec![Answer::default(); ours.clone().count()];
        let mut left = answers.len();
        while left > 0 {
            for event in self.step()? {
                let RequestId(number) = event.request();
                if !ours.contains(&number) {
                    others.push(event);
                    continue;
                }
                let place = (number - first) as usize;
                on_event(place, &event);
                left -= usize::from(answers[place].add(event));
            }
        }
        Ok(answers)
    }

    /// Takes a request in and gives its events as they come. The request is cancelled if the stream is dropped
    /// before its end.
    ///
    /// # Errors
    /// As [`Self::submit`].
    pub fn stream(&mut self, request: Request) -> Result<Stream<'_, B>, InferError> {
        let id = self.submit(request)?;
        Ok(Stream::new(self, id))
    }

    /// The next event of a request; `None` if nothing of it is left here.
    pub(crate) fn next_event(&mut self, request: RequestId) -> Result<Option<Event>, InferError> {
        loop {
            if let Some(place) = self.events.iter().position(|event| event.request() == request) {
                return Ok(self.events.remove(place));
            }
            let is_here = |sequence: &Sequence| sequence.id == request;
            if !self.waiting.iter().any(is_here) && !self.running.iter().any(is_here) {
                return Ok(None);
            }
            let events = self.step()?;
            self.events.extend(events);
        }
    }

    /// Ends a request of which nobody wants to hear any more.
    pub(crate) fn forget(&mut self, request: RequestId) {
        // What cannot be decoded is not read either.
        self.cancel(request).ok();
        self.events.retain(|event| event.request() != request);
    }

    /// Ends waiting and running requests.
    fn end_those(
        &mut self,
        reason: FinishReason,
        which: impl Fn(&Sequence) -> bool,
    ) -> Result<(), InferError> {
        let mut ended: Vec<Sequence> = self.running.extract_if(.., |sequence| which(sequence)).collect();
        let waiting = std::mem::take(&mut self.waiting);
        for sequence in waiting {
            if which(&sequence) { ended.push(sequence) } else { self.waiting.push_back(sequence) }
        }
        for mut sequence in ended {
            sequence.leave(&mut self.pool);
            self.events.push_back(sequence.finish(reason)?);
        }
        Ok(())
    }

    /// The rows of the next pass: single ones first, since backends have a faster way for those, and those of one
    /// adapter together.
    fn plan(&mut self) -> Vec<Planned> {
        let page_tokens = self.settings.page_tokens;
        let mut room = self.settings.prefill_chunk;
        let mut plan = Vec::with_capacity(self.running.len());
        for (place, sequence) in self.running.iter_mut().enumerate() {
            let rows = match sequence.pending() {
                1 => 1,
                pending => pending.min(room),
            };
            room -= if rows > 1 { rows } else { 0 };
            plan.extend(planned(place, sequence, rows, &mut self.pool, page_tokens));
        }
        let begun = plan.len();
        let may_join = plan.iter().any(|planned| planned.sequence.rows > 1) || self.lets_join();
        while may_join && room > 0 && self.running.len() < self.settings.max_batch {
            let Some(mut sequence) = self.waiting.pop_front() else { break };
            if !sequence.start(&mut self.pool, page_tokens) {
                self.waiting.push_front(sequence);
                break;
            }
            let rows = sequence.pending().min(room);
            room -= rows;
            plan.extend(planned(self.running.len(), &mut sequence, rows, &mut self.pool, page_tokens));
            self.running.push(sequence);
        }
        plan[begun..].iter_mut().for_each(|planned| planned.begins = true);
        let prompts = plan.iter().any(|planned| planned.begins || planned.sequence.rows > 1);
        self.passes = if prompts { 0 } else { self.passes + 1 };
        plan.sort_by_key(|planned| (planned.sequence.rows > 1, planned.adapter));
        plan
    }

    /// Whether the next pass may be the first prompts' though there are only single tokens in it yet.
    fn lets_join(&self) -> bool {
        let Some(first) = self.waiting.front() else { return false };
        let situation = Situation {
            running: self.running.len(),
            most: self.settings.max_batch,
            passes: self.passes,
            prompt: first.pending(),
            chunk: self.settings.prefill_chunk,
        };
        !self.steps.any() || situation.lets_join()
    }

    /// Runs a plan and lets the sequences that are complete go on.
    fn run(&mut self, plan: Vec<Planned>) -> Result<(), InferError> {
        let device = self.model.device();
        let places: Vec<usize> =
            plan.iter().filter(|planned| planned.complete).map(|planned| planned.place).collect();
        let rows = Rows::of(plan, self.few_sizes);
        let chosen = rows.chosen();
        let adapter =
            |&(adapter, rows): &(usize, usize)| AdapterRows { rows, loras: &self.adapters[adapter].1 };
        let pass = PagedPass {
            ids: rows.ids,
            index: PagedIndex::new(rows.sequences, self.settings.page_tokens, &device),
            adapters: rows.adapters.iter().map(adapter).collect(),
        };
        let hidden = self.model.hidden_paged(&pass, &mut self.cache);
        self.steps.follow();
        if places.is_empty() {
            return Ok(());
        }
        let hidden = match chosen {
            Some(chosen) => {
                let count = chosen.len();
                hidden.select(0, Tensor::<B, 1, Int>::from_data(TensorData::new(chosen, [count]), &device))
            }
            None => hidden,
        };
        let choices = self.choices(&places, self.model.logits(hidden));
        self.advance(&places, choices)
    }

    /// The steps that a plan's rows are for, each an adapter and so many rows, if programs can run them all: one new token each for
    /// sequences none of which reads what another one writes.
    fn steps_of(&mut self, plan: &[Planned]) -> Option<Vec<(usize, usize)>> {
        let suits = |planned: &Planned| planned.sequence.rows == 1 && planned.complete && !planned.begins;
        if plan.is_empty() || !self.settings.step_programs || !plan.iter().all(suits) {
            return None;
        }
        let Self { steps, model, adapters, cache, .. } = self;
        let mut sizes = Vec::new();
        for rows in plan.chunk_by(|one, next| one.adapter == next.adapter) {
            let adapter = rows[0].adapter;
            let make = || {
                let program = model.step_program(&adapters[adapter].1, cache.page_tokens(), cache.format());
                B::step_runner(&program, cache.pages())
            };
            let most = steps.prepare(adapter, rows.len(), make)?;
            sizes.extend(rows.chunks(most).map(|rows| (adapter, rows.len())));
        }
        Some(sizes)
    }

    /// Runs a plan of single tokens in the steps that it is for.
    fn run_steps(&mut self, steps: &[(usize, usize)], plan: Vec<Planned>) -> Result<(), InferError> {
        let places: Vec<usize> = plan.iter().map(|planned| planned.place).collect();
        let row = |planned: Planned| StepRow { id: planned.ids[0], sequence: planned.sequence };
        let mut rows = plan.into_iter().map(row);
        let mut choices = Vec::with_capacity(places.len());
        for &(adapter, count) in steps {
            let rows: Vec<StepRow> = rows.by_ref().take(count).collect();
            let of_step = self.run_step(adapter, &rows, &places[choices.len()..][..count])?;
            choices.extend(of_step);
        }
        self.advance(&places, choices)
    }

    /// Runs rows, whose sequences are at these places, as one step of an adapter's program.
    fn run_step(
        &mut self,
        adapter: usize,
        rows: &[StepRow],
        places: &[usize],
    ) -> Result<Vec<Option<Choice>>, InferError> {
        let runner = self.steps.get(adapter)?;
        let likeliest = runner.run(rows)?;
        if places.iter().all(|&place| self.running[place].takes_likeliest()) {
            let choice =
                |(&place, chosen): (&usize, Option<ChosenToken>)| Some(self.running[place].taken(chosen?));
            return Ok(places.iter().zip(likeliest).map(choice).collect());
        }
        let logits = runner.logits();
        Ok(self.choices(places, logits))
    }

    /// Kernels that a pass of so many single tokens launches where it runs as programs, for the model's own corrections.
    ///
    /// # Errors
    /// Why it does not run as one, if that was tried.
    pub fn step_launches(&self, rows: usize) -> Result<Option<usize>, &StepError> {
        self.steps.launches(0, rows)
    }

    /// What the device refused, if passes of single tokens run one operation at a time though there are kernels for them as one
    /// program: answers are as good then, and slower.
    #[must_use]
    pub fn step_refusal(&self) -> Option<&StepError> {
        self.steps.refusal()
    }

    /// The next tokens of sequences, from the first of the rows of logits `[n, v]`. Only rows of which a request needs all
    /// logits come to the host.
    fn choices(&self, places: &[usize], logits: Tensor<B, 2>) -> Vec<Option<Choice>> {
        let sequences: Vec<&Sequence> = places.iter().map(|&place| &self.running[place]).collect();
        let [rows, vocabulary] = logits.dims();
        let whole: Vec<usize> =
            (0..sequences.len()).filter(|&row| sequences[row].needs_all_logits()).collect();
        let mut found = vec![None; sequences.len()];
        if !whole.is_empty() {
            let ids = TensorData::new(whole.iter().map(|&row| row as i32).collect(), [whole.len()]);
            let ids = Tensor::<B, 1, Int>::from_data(ids, &logits.device());
            let here = host_floats(logits.clone().select(0, ids));
            let choose = |(&row, logits): (&usize, &[f32])| (row, sequences[row].choose(logits));
            let chosen: Vec<_> = whole.par_iter().zip(here.par_chunks(vocabulary)).map(choose).collect();
            chosen.into_iter().for_each(|(row, choice)| found[row] = choice);
        }
        if whole.len() < sequences.len() {
            let choice = |sequence: &&Sequence| {
                // What is chosen on the host is not drawn here as well.
                if sequence.needs_all_logits() { TokenChoice::default() } else { sequence.token_choice() }
            };
            let mut choices: Vec<_> = sequences.iter().map(choice).collect();
            choices.resize(rows, TokenChoice::default());
            let chosen = B::choose_tokens(logits, &choices);
            for (row, (sequence, chosen)) in sequences.iter().zip(chosen).enumerate() {
                if !sequence.needs_all_logits() {
                    found[row] = chosen.map(|chosen| sequence.taken(chosen));
                }
            }
        }
        found
    }

    /// Lets sequences go on with their tokens, and those that end leave.
    fn advance(&mut self, places: &[usize], choices: Vec<Option<Choice>>) -> Result<(), InferError> {
        let end = self.tokenizer.as_ref().map(Tokenizer::eos_id);
        let (mut events, mut ended) = (Vec::new(), Vec::new());
        for (&place, choice) in places.iter().zip(choices) {
            if let Some(reason) = self.running[place].advance(choice, end, &mut events)? {
                ended.push((place, reason));
            }
        }
        self.events.extend(events);
        ended.sort_unstable_by_key(|&(place, _)| place);
        for (place, reason) in ended.into_iter().rev() {
            let mut sequence = self.running.remove(place);
            if reason == FinishReason::NotANumber {
                // Programs hold the pages too; memory that others hold would be copied instead of cleared.
                self.steps.drop_programs();
                self.cache.clear(&sequence.distrust(&mut self.pool));
            }
            sequence.leave(&mut self.pool);
            self.events.push_back(sequence.finish(reason)?);
        }
        Ok(())
    }
}

fn planned(
    place: usize,
    sequence: &mut Sequence,
    rows: usize,
    pool: &mut PagePool,
    page_tokens: usize,
) -> Option<Planned> {
    if rows == 0 {
        return None;
    }
    let pending = sequence.pending();
    let first = sequence.tokens.len() - pending;
    Some(Planned {
        place,
        adapter: sequence.adapter,
        ids: sequence.tokens[first..first + rows].to_vec(),
        complete: rows == pending,
        begins: false,
        sequence: sequence.plan(rows, pool, page_tokens),
    })
}

/// A plan as the model takes it.
#[derive(Default)]
struct Rows {
    ids: Vec<u32>,
    sequences: Vec<PagedSequence>,
    /// Adapters and how many rows they have.
    adapters: Vec<(usize, usize)>,
    /// Rows after which a token is chosen.
    complete: Vec<usize>,
    fill: bool,
}

impl Rows {
    /// With `fill`, rows that belong to nobody make their number one of few, behind the single rows: where memory
    /// is kept by exact size, each new size would be kept for good.
    fn of(plan: Vec<Planned>, fill: bool) -> Self {
        let rows: usize = plan.iter().map(|planned| planned.sequence.rows).sum();
        let mut fillers = if fill { few_sizes(rows) - rows } else { 0 };
        let mut all = Self { fill, ..Self::default() };
        let mut adapter = plan.first().map_or(0, |planned| planned.adapter);
        for Planned { adapter: own, ids, sequence, complete, .. } in plan {
            if sequence.rows > 1 {
                all.add_fillers(std::mem::take(&mut fillers), adapter);
            }
            adapter = own;
            all.push(ids, sequence, adapter);
            if complete {
                all.complete.push(all.ids.len() - 1);
            }
        }
        all.add_fillers(fillers, adapter);
        all
    }

    /// The rows that logits are needed of, some twice if it takes that to make their number one of few; `None` if
    /// the rows from the first to the last are those.
    fn chosen(&self) -> Option<Vec<i32>> {
        let count = self.complete.len();
        let count = if self.fill && count > 0 { few_sizes(count) } else { count };
        let in_place = self.complete.iter().enumerate().all(|(place, &row)| place == row);
        if in_place && count == self.ids.len() {
            return None;
        }
        let last = self.complete.last().copied().unwrap_or(0);
        let rows = self.complete.iter().copied().chain(std::iter::repeat(last));
        Some(rows.take(count).map(|row| row as i32).collect())
    }

    fn add_fillers(&mut self, rows: usize, adapter: usize) {
        for _ in 0..rows {
            self.push(vec![0], PagedSequence { pages: vec![SCRATCH_PAGE], length: 1, rows: 1 }, adapter);
        }
    }

    fn push(&mut self, ids: Vec<u32>, sequence: PagedSequence, adapter: usize) {
        match self.adapters.last_mut() {
            Some((last, rows)) if *last == adapter => *rows += sequence.rows,
            _ => self.adapters.push((adapter, sequence.rows)),
        }
        self.ids.extend(ids);
        self.sequences.push(sequence);
    }
}

/// The least of at most four sizes between neighbouring powers of two that holds so many rows.
fn few_sizes(rows: usize) -> usize {
    rows.next_multiple_of((rows.next_power_of_two() / 8).max(1))
}
