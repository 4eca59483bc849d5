//! Numbers for tests. Those inside this crate and those of `buzzer-train` name this file by its path: a library would have to
//! offer them to everybody.

/// Numbers between -1 and 1 that look random, the same on every machine.
pub(crate) fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(1);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}
