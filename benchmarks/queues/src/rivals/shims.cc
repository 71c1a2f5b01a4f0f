// moodycamel's and Boost's queues as tables of C functions, for items of 8, 64 and 4,096 bytes.
#include <boost/lockfree/queue.hpp>
#include <concurrentqueue/concurrentqueue.h>
#include <cstddef>
#include <cstdint>

namespace {

template <std::size_t N> struct Item {
    std::uint64_t words[N / 8];
};

// As many items in each producer's queue as the others hold in all; memory is allocated as needed. (Without allocation a
// producer that finds all blocks in the hands of others never gets one, and waits for ever.)
struct Bounded : moodycamel::ConcurrentQueueDefaultTraits {
    static const std::size_t MAX_SUBQUEUE_SIZE = 1024;
};

struct Shims {
    void *(*moodycamel_new)(std::size_t capacity, std::size_t producers);
    void (*moodycamel_free)(void *queue);
    void *(*producer_new)(void *queue);
    void (*producer_free)(void *token);
    void *(*consumer_new)(void *queue);
    void (*consumer_free)(void *token);
    bool (*moodycamel_put)(void *queue, void *token, const void *item);
    bool (*moodycamel_get)(void *queue, void *token, void *item);
    void *(*boost_new)(std::size_t capacity);
    void (*boost_free)(void *queue);
    bool (*boost_put)(void *queue, const void *item);
    bool (*boost_get)(void *queue, void *item);
};

template <std::size_t N> constexpr Shims shims_of() {
    using I = Item<N>;
    using M = moodycamel::ConcurrentQueue<I, Bounded>;
    using B = boost::lockfree::queue<I>;
    using P = moodycamel::ProducerToken;
    using C = moodycamel::ConsumerToken;
    return Shims{
        [](std::size_t capacity, std::size_t producers) -> void * { return new M(capacity, producers, 0); },
        [](void *queue) { delete static_cast<M *>(queue); },
        [](void *queue) -> void * { return new P(*static_cast<M *>(queue)); },
        [](void *token) { delete static_cast<P *>(token); },
        [](void *queue) -> void * { return new C(*static_cast<M *>(queue)); },
        [](void *token) { delete static_cast<C *>(token); },
        [](void *queue, void *token, const void *item) {
            return static_cast<M *>(queue)->enqueue(*static_cast<P *>(token), *static_cast<const I *>(item));
        },
        [](void *queue, void *token, void *item) {
            return static_cast<M *>(queue)->try_dequeue(*static_cast<C *>(token), *static_cast<I *>(item));
        },
        [](std::size_t capacity) -> void * { return new B(capacity); },
        [](void *queue) { delete static_cast<B *>(queue); },
        [](void *queue, const void *item) {
            return static_cast<B *>(queue)->bounded_push(*static_cast<const I *>(item));
        },
        [](void *queue, void *item) { return static_cast<B *>(queue)->pop(*static_cast<I *>(item)); },
    };
}

const Shims shims_8 = shims_of<8>(), shims_64 = shims_of<64>(), shims_4096 = shims_of<4096>();

} // namespace

extern "C" const Shims *queue_shims(std::size_t item_size) {
    return item_size == 8 ? &shims_8 : item_size == 64 ? &shims_64 : item_size == 4096 ? &shims_4096 : nullptr;
}
