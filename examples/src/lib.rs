//! Programs over the buzzer facade.
