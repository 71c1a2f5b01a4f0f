//! Which blocks an open file will be asked for next.
//!
//! The service hears of what is missing only. So it compares what is asked for with where its last read-ahead ended: blocks of one distance
//! (1: in order, backwards and strides as well) are followed, each time twice as far; anything else is random, of which one block is
//! fetched and nothing more.

/// Blocks fetched at the first sign of an order.
const FIRST: u64 = 4;
/// Blocks fetched in order: 1 MiB.
const IN_ORDER_MAX: u64 = 16;
/// Blocks fetched at a distance, where a guess is dearer.
const STRIDED_MAX: u64 = 8;

/// One open file's past.
#[derive(Debug, Default)]
pub struct Ahead {
    last: Option<u64>,
    /// The distance of the last two requests.
    distance: i64,
    /// What is fetched at a time; 0 where no order is known.
    count: u64,
    /// Where the next request falls if the order stays.
    expected: Option<u64>,
}

/// Blocks to fetch: `count` of them from `first` on, `distance` apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    first: u64,
    distance: i64,
    count: u64,
}

impl Plan {
    /// The blocks below `end`.
    pub fn blocks(self, end: u64) -> impl Iterator<Item = u64> {
        (0..self.count as i64)
            .map_while(move |n| self.first.checked_add_signed(self.distance.checked_mul(n)?))
            .take_while(move |block| *block < end)
    }
}

impl Ahead {
    /// `wanted` blocks from `block` on are asked for. At the most `count_max` blocks are worth to be fetched.
    pub fn plan(&mut self, block: u64, wanted: u64, count_max: u64) -> Plan {
        let distance = self.last.map_or(0, |last| block.wrapping_sub(last) as i64);
        if self.is_expected(block) {
            self.count *= 2;
        } else if self.last.is_none() && block == 0 {
            // Who begins at the beginning mostly goes on.
            (self.distance, self.count) = (1, FIRST);
        } else if distance == 1 {
            (self.distance, self.count) = (1, FIRST);
        } else if distance != 0 && distance == self.distance {
            self.count = FIRST;
        } else {
            (self.distance, self.count) = (distance, 0);
        }
        if wanted > 1 {
            let ahead = if self.distance == 1 { self.count } else { 0 };
            (self.distance, self.count) = (1, ahead.max(wanted));
        }
        let max = if self.distance == 1 { IN_ORDER_MAX } else { STRIDED_MAX };
        self.count = self.count.min(max).min(count_max);
        self.last = Some(block);
        let count = self.count.max(1);
        let reach = self.distance.checked_mul(count as i64).filter(|_| self.count > 0);
        self.expected = reach.and_then(|reach| block.checked_add_signed(reach));
        Plan { first: block, distance: self.distance, count }
    }

    fn is_expected(&self, block: u64) -> bool {
        let Some(expected) = self.expected.filter(|_| self.count > 0) else { return false };
        // In order, blocks that were there already are not asked for.
        block == expected || (self.distance == 1 && block > expected && block - expected <= IN_ORDER_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const END: u64 = 100_000;

    /// Reads blocks one after the other, each asked for only if it was not fetched; tells how many requests it took, and how many
    /// blocks were fetched.
    fn read(blocks: impl Iterator<Item = u64>) -> (usize, usize) {
        let (mut ahead, mut there, mut requests) = (Ahead::default(), std::collections::HashSet::new(), 0);
        for block in blocks {
            if !there.contains(&block) {
                requests += 1;
                there.extend(ahead.plan(block, 1, u64::MAX).blocks(END));
            }
        }
        (requests, there.len())
    }

    #[test]
    fn follows_who_reads_in_order() {
        let (requests, fetched) = read(0..1600);
        assert!(requests <= 105 && fetched < 1620, "{requests} requests, {fetched} blocks");
        let (requests, fetched) = read(5000..6600);
        assert!(requests <= 107 && fetched < 1620, "{requests} requests, {fetched} blocks");
    }

    #[test]
    fn follows_strides_and_who_reads_backwards() {
        for blocks in [Vec::from_iter((100..9000).step_by(7)), (1000..3000).rev().collect()] {
            let (requests, fetched) = read(blocks.iter().copied());
            assert!(requests * 6 < blocks.len(), "{requests} requests for {}", blocks.len());
            assert!(fetched < blocks.len() + 10, "{fetched} blocks");
        }
    }

    #[test]
    fn fetches_nothing_more_for_who_reads_here_and_there() {
        let mut random = 1u64;
        let blocks = std::iter::repeat_with(|| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            1 + (random >> 33) % (END - 1)
        });
        let (requests, fetched) = read(blocks.take(2000));
        assert!(fetched <= requests + 40, "{fetched} blocks for {requests} requests");
    }

    #[test]
    fn begins_again_after_a_jump_and_goes_on_where_others_have_read() {
        let mut ahead = Ahead::default();
        assert_eq!(ahead.plan(0, 1, 99).count, FIRST);
        assert_eq!(ahead.plan(4, 1, 99).count, 8);
        assert_eq!(ahead.plan(20, 1, 99).count, 16, "eight blocks of another reader were there");
        assert_eq!(ahead.plan(5000, 1, 99).count, 1);
        assert_eq!(ahead.plan(5001, 1, 99).count, FIRST);
        assert_eq!(ahead.plan(5005, 1, 2).count, 2, "there is room for no more");
        assert_eq!(ahead.plan(0, 1, 0).count, 1);
        assert_eq!(ahead.plan(7000, 9, 99).count, 9, "so many were asked for");
        assert_eq!(ahead.plan(7009, 1, 99).count, 16);
    }

    proptest! {
        #[test]
        fn any_requests_are_answered(requests in prop::collection::vec((any::<u64>(), any::<u64>(), 0u64..40), 0..100), end: u64) {
            let mut ahead = Ahead::default();
            for (block, wanted, count_max) in requests {
                let blocks: Vec<_> = ahead.plan(block, wanted, count_max).blocks(end).collect();
                prop_assert!(blocks.len() as u64 <= IN_ORDER_MAX);
                prop_assert!(blocks.first().is_none_or(|first| *first == block));
                prop_assert!(blocks.iter().all(|block| *block < end));
            }
        }
    }
}
