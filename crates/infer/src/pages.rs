//! Which pages of the cache are free, and which hold what.
//!
//! A page is held by so many sequences. Whoever fills a page may publish it under what it follows and what it
//! holds; a later sequence that begins alike then holds it too instead of computing it again. A published page that
//! nobody holds is idle: it keeps what it has until its room is needed, the longest idle one first. What it trades:
//! only whole pages are shared. What it refuses: to hand out a page that was promised to another.

use std::collections::{HashMap, VecDeque};

use buzzer_kernels::SCRATCH_PAGE;

/// What a page holds: the tokens that fill it, after all that stands before.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Content {
    after: Chapter,
    tokens: Box<[u32]>,
}

/// A text from its beginning to the end of a page, by a number that is never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Chapter {
    /// The beginning of a text. What is computed of one depends on the adapter.
    Start { adapter: usize },
    /// The end of a published page.
    Page(u64),
}

/// A published page.
#[derive(Clone, Debug)]
struct Published {
    content: Content,
    chapter: u64,
}

#[derive(Clone, Debug, Default)]
struct Page {
    holders: usize,
    published: Option<Published>,
}

/// All pages but the scratch page.
#[derive(Debug)]
pub(crate) struct PagePool {
    pages: Vec<Page>,
    /// Pages that nobody holds and that are not published.
    free: Vec<u32>,
    /// Published pages that nobody held when they were put here, the longest idle first; those held again are
    /// passed over.
    idle: VecDeque<u32>,
    idle_count: usize,
    index: HashMap<Content, u32>,
    chapters: u64,
    promised: usize,
}

impl PagePool {
    /// So many pages, the scratch page among them.
    pub(crate) fn new(pages: usize) -> Self {
        Self {
            pages: vec![Page::default(); pages],
            free: (0..pages as u32).filter(|&page| page != SCRATCH_PAGE).rev().collect(),
            idle: VecDeque::new(),
            idle_count: 0,
            index: HashMap::new(),
            chapters: 0,
            promised: 0,
        }
    }

    /// Pages that sequences can hold.
    pub(crate) fn capacity(&self) -> usize {
        self.pages.len() - 1
    }

    /// Pages that can still be promised.
    pub(crate) fn available(&self) -> usize {
        self.free.len() + self.idle_count - self.promised
    }

    /// Pages held by a sequence.
    pub(crate) fn held(&self) -> usize {
        self.capacity() - self.free.len() - self.idle_count
    }

    /// Sets pages aside for [`Self::take`]; says whether there were as many.
    #[must_use]
    pub(crate) fn promise(&mut self, pages: usize) -> bool {
        let fits = pages <= self.available();
        if fits {
            self.promised += pages;
        }
        fits
    }

    /// Gives back a promise of pages.
    pub(crate) fn forgo(&mut self, pages: usize) {
        self.promised -= pages;
    }

    /// A page that was promised; the caller holds it.
    ///
    /// # Panics
    /// If none was promised.
    pub(crate) fn take(&mut self) -> u32 {
        assert!(self.promised > 0, "a page that was not promised");
        self.promised -= 1;
        let page = self.free.pop().unwrap_or_else(|| self.evict());
        self.pages[page as usize].holders = 1;
        page
    }

    /// The page that has been idle longest, unpublished.
    fn evict(&mut self) -> u32 {
        loop {
            let page = self.idle.pop_front().expect("promised pages are free or idle");
            let entry = &mut self.pages[page as usize];
            if entry.holders > 0 {
                continue;
            }
            let Some(published) = entry.published.take() else { continue };
            self.index.remove(&published.content);
            self.idle_count -= 1;
            return page;
        }
    }

    /// The published page that holds these tokens after a chapter, and the chapter that it ends.
    pub(crate) fn find(&self, after: Chapter, tokens: &[u32]) -> Option<(u32, Chapter)> {
        let page = *self.index.get(&Content { after, tokens: tokens.into() })?;
        let chapter = self.pages[page as usize].published.as_ref()?.chapter;
        Some((page, Chapter::Page(chapter)))
    }

    /// Sequences that hold a page.
    pub(crate) fn holders(&self, page: u32) -> usize {
        self.pages[page as usize].holders
    }

    /// Whether nobody holds a page, so that holding it makes one fewer available.
    pub(crate) fn is_idle(&self, page: u32) -> bool {
        self.pages[page as usize].holders == 0
    }

    /// Holds a published page once more. An idle one must have been promised.
    pub(crate) fn hold(&mut self, page: u32) {
        if self.is_idle(page) {
            self.idle_count -= 1;
            self.promised -= 1;
        }
        self.pages[page as usize].holders += 1;
    }

    /// Gives up a held page.
    pub(crate) fn release(&mut self, page: u32) {
        let entry = &mut self.pages[page as usize];
        entry.holders = entry.holders.checked_sub(1).expect("a page that nobody holds");
        if entry.holders > 0 {
            return;
        }
        if entry.published.is_some() {
            self.idle.retain(|&other| other != page);
            self.idle.push_back(page);
            self.idle_count += 1;
        } else {
            self.free.push(page);
        }
    }

    /// Publishes a held page as what holds these tokens after a chapter; gives the chapter that it ends. If another
    /// page is published as that, this one stays unpublished.
    pub(crate) fn publish(&mut self, page: u32, after: Chapter, tokens: &[u32]) -> Chapter {
        if let Some((_, chapter)) = self.find(after, tokens) {
            return chapter;
        }
        self.chapters += 1;
        let content = Content { after, tokens: tokens.into() };
        self.index.insert(content.clone(), page);
        self.pages[page as usize].published = Some(Published { content, chapter: self.chapters });
        Chapter::Page(self.chapters)
    }

    /// Takes back what is published of a page, because it is not to be trusted.
    pub(crate) fn withdraw(&mut self, page: u32) {
        if let Some(published) = self.pages[page as usize].published.take() {
            self.index.remove(&published.content);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{RngCore, SeedableRng};

    use super::*;

    const START: Chapter = Chapter::Start { adapter: 0 };

    fn taken(pool: &mut PagePool) -> u32 {
        assert!(pool.promise(1));
        pool.take()
    }

    #[test]
    fn what_was_published_is_found_until_its_room_is_needed() {
        let mut pool = PagePool::new(4);
        let first = taken(&mut pool);
        let chapter = pool.publish(first, START, &[1, 2]);
        let second = taken(&mut pool);
        pool.publish(second, chapter, &[3, 4]);
        assert_eq!(pool.find(START, &[1, 2]), Some((first, chapter)));
        assert_eq!(pool.find(Chapter::Start { adapter: 1 }, &[1, 2]), None);
        assert_eq!(pool.find(START, &[3, 4]), None);
        pool.release(first);
        pool.release(second);
        assert_eq!((pool.available(), pool.held()), (3, 0));
        // Two more pages: one that was never used, then the one that has been idle longest.
        assert_eq!([taken(&mut pool), taken(&mut pool)].map(|page| page == first), [false, true]);
        assert_eq!(pool.find(START, &[1, 2]), None);
        assert!(pool.find(chapter, &[3, 4]).is_some());
        assert!(pool.promise(1) && !pool.promise(1));
    }

    #[test]
    fn the_same_text_is_published_once() {
        let mut pool = PagePool::new(4);
        let pages = [taken(&mut pool), taken(&mut pool)];
        let chapters = pages.map(|page| pool.publish(page, START, &[1]));
        assert_eq!(chapters[0], chapters[1]);
        pool.release(pages[1]);
        assert_eq!(pool.find(START, &[1]), Some((pages[0], chapters[0])));
        pool.withdraw(pages[0]);
        assert_eq!(pool.find(START, &[1]), None);
        pool.release(pages[0]);
        assert_eq!(pool.available(), 3);
    }

    /// Random work against a plain count of who holds what.
    fn work(seed: u64, pages: usize) {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut pool = PagePool::new(pages);
        let mut held: BTreeMap<u32, usize> = BTreeMap::new();
        let (mut promised, mut published) = (0_usize, Vec::<(Chapter, [u32; 2])>::new());
        for _ in 0..2000 {
            let pick = random.next_u32() as usize;
            let some_page = held.keys().nth(pick % held.len().max(1)).copied();
            match (random.next_u32() % 6, some_page) {
                (0, _) => promised += usize::from(pool.promise(1)),
                (1, _) if promised > 0 => {
                    promised -= 1;
                    let page = pool.take();
                    assert!(page != SCRATCH_PAGE && held.insert(page, 1).is_none(), "handed out twice");
                }
                (2, _) if promised > 0 => {
                    promised -= 1;
                    pool.forgo(1);
                }
                (3, Some(page)) => {
                    pool.release(page);
                    let count = held.get_mut(&page).unwrap();
                    *count -= 1;
                    held.retain(|_, count| *count > 0);
                }
                (4, Some(page)) if pool.pages[page as usize].published.is_none() => {
                    let after =
                        published.get(pick % (published.len() + 1)).map_or(START, |&(chapter, _)| chapter);
                    let tokens = [pick as u32 % 3, random.next_u32() % 3];
                    let chapter = pool.publish(page, after, &tokens);
                    assert_eq!(pool.find(after, &tokens).unwrap().1, chapter);
                    published.push((chapter, tokens));
                }
                (5, _) if !published.is_empty() => {
                    let (after, tokens) = published[pick % published.len()];
                    let Some((page, _)) = pool.find(after, &tokens) else { continue };
                    if !pool.is_idle(page) || pool.promise(1) {
                        pool.hold(page);
                        *held.entry(page).or_default() += 1;
                    }
                }
                _ => {}
            }
            assert_eq!(pool.held(), held.len());
            assert_eq!(pool.available() + promised + held.len(), pool.capacity());
            assert!(held.iter().all(|(&page, &count)| pool.pages[page as usize].holders == count));
        }
        pool.forgo(promised);
        held.iter().for_each(|(&page, &count)| (0..count).for_each(|_| pool.release(page)));
        assert_eq!((pool.available(), pool.held()), (pages - 1, 0));
        // And all of them can be had again.
        assert!(pool.promise(pages - 1));
        let all: std::collections::BTreeSet<u32> = (1..pages).map(|_| pool.take()).collect();
        assert_eq!(all.len(), pages - 1);
        assert!(pool.index.is_empty() && pool.available() == 0);
    }

    #[test]
    fn no_page_is_lost_or_handed_out_twice() {
        (0..60).for_each(|seed| work(seed, 2 + seed as usize % 23));
    }
}
