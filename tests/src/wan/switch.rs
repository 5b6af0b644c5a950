//! The learning switch of the stretched Ethernet segment: which sites a frame must go to. Pure.
//!
//! A station belongs to the site that its last frame came from, so a guest that announces itself after a move is found at
//! once. Guarantees bounded memory. Does not age stations out and knows no VLANs.

use std::collections::HashMap;

/// More stations than any lab has; beyond this unknown ones are flooded and not learnt.
pub const MAX_STATIONS: usize = 4096;

/// Where a frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// To one site.
    To(usize),
    /// To every other site.
    Flood,
    /// Nowhere: the station is at the site that the frame came from, or the frame is none.
    Stay,
}

/// The table of stations.
#[derive(Debug, Default)]
pub struct Switch {
    stations: HashMap<[u8; 6], usize>,
}

impl Switch {
    /// Learns where the sender is and says where the frame goes.
    pub fn route(&mut self, from: usize, frame: &[u8]) -> Route {
        let Some(&[d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5]) = frame.first_chunk::<12>() else {
            return Route::Stay;
        };
        let (destination, source) = ([d0, d1, d2, d3, d4, d5], [s0, s1, s2, s3, s4, s5]);
        let group = |address: [u8; 6]| address[0] & 1 == 1;
        if !group(source) && (self.stations.len() < MAX_STATIONS || self.stations.contains_key(&source)) {
            self.stations.insert(source, from);
        }
        if group(destination) {
            return Route::Flood;
        }
        match self.stations.get(&destination) {
            Some(&site) if site == from => Route::Stay,
            Some(&site) => Route::To(site),
            None => Route::Flood,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [u8; 6] = [0xff; 6];
    const X: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const Y: [u8; 6] = [2, 0, 0, 0, 0, 2];

    fn frame(destination: [u8; 6], source: [u8; 6]) -> Vec<u8> {
        [destination, source].concat()
    }

    #[test]
    fn stations_are_found_after_their_first_frame_and_after_a_move() {
        let mut switch = Switch::default();
        assert_eq!(switch.route(0, &frame(Y, X)), Route::Flood);
        assert_eq!(switch.route(1, &frame(X, Y)), Route::To(0));
        assert_eq!(switch.route(0, &frame(Y, X)), Route::To(1));
        assert_eq!(switch.route(2, &frame(ALL, Y)), Route::Flood);
        assert_eq!(switch.route(0, &frame(Y, X)), Route::To(2));
        assert_eq!(switch.route(2, &frame(Y, X)), Route::Stay);
        assert_eq!(switch.route(2, &[0; 5]), Route::Stay);
    }

    #[test]
    fn the_table_is_bounded() {
        let mut switch = Switch::default();
        for n in 0..=MAX_STATIONS {
            let [.., a, b] = n.to_be_bytes();
            switch.route(0, &frame(ALL, [2, 0, 0, 0, a, b]));
        }
        assert_eq!(switch.stations.len(), MAX_STATIONS);
    }
}
