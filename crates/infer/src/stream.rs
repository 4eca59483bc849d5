//! The events of one request as an iterator.

use buzzer_kernels::KernelBackend;

use crate::{Engine, Event, InferError, RequestId};

/// The events of one request; made by [`Engine::stream`].
///
/// Asking for the next one runs the engine as far as it takes, other requests included.
#[derive(Debug)]
pub struct Stream<'a, B: KernelBackend> {
    engine: &'a mut Engine<B>,
    request: RequestId,
    ended: bool,
}

impl<'a, B: KernelBackend> Stream<'a, B> {
    pub(crate) fn new(engine: &'a mut Engine<B>, request: RequestId) -> Self {
        Self { engine, request, ended: false }
    }
}

impl<B: KernelBackend> Iterator for Stream<'_, B> {
    type Item = Result<Event, InferError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let event = self.engine.next_event(self.request);
        self.ended = matches!(event, Ok(None | Some(Event::Finished { .. })));
        event.transpose()
    }
}

impl<B: KernelBackend> Drop for Stream<'_, B> {
    fn drop(&mut self) {
        if !self.ended {
            self.engine.forget(self.request);
        }
    }
}
