// NCCL among the processes of one host, through a file in shared memory. Calls block until all ranks have made them.
//
// With KFAC_DIST_EMULATED_NCCL=trace every call is printed, and whether it was made within a group.

#include <fcntl.h>
#define __CUDA_FP16_H__ // needs headers that come with no wheel, and NCCL only names its types
#define __CUDA_BF16_H__
#define __CUDA_FP8_H__
#include <nccl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

namespace {

constexpr size_t kHeaderBytes = 4096;
constexpr size_t kSlotBytes = size_t(256) << 20; // the largest message; takes memory only as far as it is used

struct Header {
    std::atomic<int> arrived;
    std::atomic<int> generation;
};

struct Message { // one end of a send and receive
    ncclComm* communicator;
    bool is_sent;
    void* data;
    size_t bytes;
    int peer;
};

thread_local int group_depth = 0;
thread_local std::vector<std::function<void()>> group;
thread_local std::vector<Message> messages;

} // namespace

struct ncclComm {
    int rank;
    int size;
    Header* header;

    char* slot(int of) const { return reinterpret_cast<char*>(header) + kHeaderBytes + of * kSlotBytes; }

    void barrier() const {
        int generation = header->generation.load();
        if (header->arrived.fetch_add(1) + 1 == size) {
            header->arrived = 0;
            header->generation++;
        } else {
            while (header->generation.load() == generation) usleep(20);
        }
    }
};

namespace {

[[noreturn]] void fail(const char* what, size_t value) {
    fprintf(stderr, "the emulated NCCL cannot %s: %zu\n", what, value);
    abort();
}

size_t width(ncclDataType_t type) {
    switch (type) {
        case ncclInt8:
        case ncclUint8:
            return 1;
        case ncclFloat16:
        case ncclBfloat16:
            return 2;
        case ncclInt32:
        case ncclUint32:
        case ncclFloat32:
            return 4;
        default:
            return 8;
    }
}

template <class Value>
void combine(void* into, const void* from, size_t count, ncclRedOp_t op) {
    auto* a = static_cast<Value*>(into);
    auto* b = static_cast<const Value*>(from);
    for (size_t i = 0; i < count; i++) {
        if (op == ncclSum) a[i] = a[i] + b[i];
        else if (op == ncclMax) a[i] = a[i] > b[i] ? a[i] : b[i];
        else if (op == ncclMin) a[i] = a[i] < b[i] ? a[i] : b[i];
        else fail("reduce by this operation", op);
    }
}

void combine(void* into, const void* from, size_t count, ncclDataType_t type, ncclRedOp_t op) {
    if (type == ncclFloat32) combine<float>(into, from, count, op);
    else if (type == ncclFloat64) combine<double>(into, from, count, op);
    else if (type == ncclInt32) combine<int>(into, from, count, op);
    else if (type == ncclInt64) combine<long>(into, from, count, op);
    else if (type == ncclUint8) combine<unsigned char>(into, from, count, op);
    else fail("reduce this type", type);
}

// What all ranks have put at `offset` of their slots, combined in the order of the ranks.
std::vector<char> combined(ncclComm* c, size_t offset, size_t count, ncclDataType_t type, ncclRedOp_t op) {
    size_t bytes = count * width(type);
    std::vector<char> result(c->slot(0) + offset, c->slot(0) + offset + bytes);
    for (int rank = 1; rank < c->size; rank++) combine(result.data(), c->slot(rank) + offset, count, type, op);
    return result;
}

ncclResult_t start(ncclComm* c, const char* name, size_t bytes, std::function<void()> collective) {
    static const char* wanted = getenv("KFAC_DIST_EMULATED_NCCL");
    static const bool traces = wanted && strcmp(wanted, "trace") == 0;
    if (traces) fprintf(stderr, "nccl %d/%d %s %zu%s\n", c->rank, c->size, name, bytes, group_depth ? " grouped" : "");
    if (bytes > kSlotBytes) fail("send so many bytes at once", bytes);
    if (group_depth) group.push_back(std::move(collective));
    else collective();
    return ncclSuccess;
}

// All sends and receives of a group; every rank of the communicator has some.
void exchange() {
    if (messages.empty()) return;
    ncclComm* c = messages[0].communicator;
    size_t place = kSlotBytes / c->size;
    for (auto& message : messages) {
        if (message.bytes > place) fail("send so many bytes at once", message.bytes);
        if (message.communicator != c) fail("send over several communicators in a group", messages.size());
        for (auto* other = &message + 1; other < messages.data() + messages.size(); other++)
            if (other->is_sent == message.is_sent && other->peer == message.peer) fail("send twice to a rank", other->peer);
        if (message.is_sent) memcpy(c->slot(c->rank) + message.peer * place, message.data, message.bytes);
    }
    c->barrier();
    for (auto& message : messages)
        if (!message.is_sent) memcpy(message.data, c->slot(message.peer) + c->rank * place, message.bytes);
    c->barrier();
    messages.clear();
}

ncclResult_t post(Message message, const char* name) {
    return start(message.communicator, name, message.bytes, [=] {
        messages.push_back(message);
        if (!group_depth) exchange();
    });
}

ncclResult_t connect(ncclComm_t* made, int size, ncclUniqueId id, int rank) {
    int file = shm_open(reinterpret_cast<char*>(&id), O_RDWR | O_CREAT, 0600);
    size_t bytes = kHeaderBytes + kSlotBytes * size;
    if (file < 0 || ftruncate(file, bytes)) return ncclSystemError;
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (memory == MAP_FAILED) return ncclSystemError;
    *made = new ncclComm{rank, size, static_cast<Header*>(memory)};
    (*made)->barrier();
    if (rank == 0) shm_unlink(reinterpret_cast<char*>(&id));
    return ncclSuccess;
}

} // namespace

extern "C" {
#define EXPORT __attribute__((visibility("default")))
#define NCCL EXPORT ncclResult_t

NCCL ncclGetVersion(int* version) { return *version = NCCL_VERSION_CODE, ncclSuccess; }
EXPORT const char* ncclGetErrorString(ncclResult_t) { return "an error of the emulated NCCL"; }
EXPORT const char* ncclGetLastError(ncclComm_t) { return ""; }

NCCL ncclGetUniqueId(ncclUniqueId* id) {
    static std::atomic<int> number{0};
    memset(id, 0, sizeof *id);
    snprintf(reinterpret_cast<char*>(id), sizeof *id, "/kfac-dist-emulated-nccl-%d-%d", getpid(), number++);
    return ncclSuccess;
}
NCCL ncclCommInitRank(ncclComm_t* made, int size, ncclUniqueId id, int rank) { return connect(made, size, id, rank); }
NCCL ncclCommInitRankConfig(ncclComm_t* made, int size, ncclUniqueId id, int rank, ncclConfig_t*) {
    return connect(made, size, id, rank);
}
NCCL ncclCommSplit(ncclComm_t c, int, int, ncclComm_t* made, ncclConfig_t*) { // for groups of all ranks
    ncclUniqueId id;
    if (c->rank == 0) {
        ncclGetUniqueId(&id);
        memcpy(c->slot(0), &id, sizeof id);
    }
    c->barrier();
    memcpy(&id, c->slot(0), sizeof id);
    c->barrier();
    return connect(made, c->size, id, c->rank);
}
NCCL ncclCommDestroy(ncclComm_t c) {
    munmap(c->header, kHeaderBytes + kSlotBytes * c->size);
    delete c;
    return ncclSuccess;
}
NCCL ncclCommAbort(ncclComm_t) { return ncclSuccess; }
NCCL ncclCommFinalize(ncclComm_t) { return ncclSuccess; }
NCCL ncclCommGetAsyncError(ncclComm_t, ncclResult_t* error) { return *error = ncclSuccess; }
NCCL ncclCommCount(const ncclComm_t c, int* count) { return *count = c->size, ncclSuccess; }
NCCL ncclCommUserRank(const ncclComm_t c, int* rank) { return *rank = c->rank, ncclSuccess; }

NCCL ncclCommRegister(const ncclComm_t, void*, size_t, void** handle) { return *handle = nullptr, ncclSuccess; }
NCCL ncclCommDeregister(const ncclComm_t, void*) { return ncclSuccess; }

NCCL ncclGroupStart() { return group_depth++, ncclSuccess; }
NCCL ncclGroupEnd() {
    if (--group_depth) return ncclSuccess;
    auto collectives = std::move(group);
    group.clear();
    group_depth++; // sends and receives are gathered first
    for (auto& collective : collectives) collective();
    group_depth--;
    exchange();
    return ncclSuccess;
}

NCCL ncclAllReduce(
    const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op, ncclComm_t c, cudaStream_t) {
    size_t bytes = count * width(type);
    return start(c, "AllReduce", bytes, [=] {
        memcpy(c->slot(c->rank), from, bytes);
        c->barrier();
        auto result = combined(c, 0, count, type, op);
        c->barrier();
        memcpy(to, result.data(), bytes);
    });
}
NCCL ncclReduce(
    const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op, int root, ncclComm_t c, cudaStream_t) {
    size_t bytes = count * width(type);
    return start(c, "Reduce", bytes, [=] {
        memcpy(c->slot(c->rank), from, bytes);
        c->barrier();
        if (c->rank == root) memcpy(to, combined(c, 0, count, type, op).data(), bytes);
        c->barrier();
    });
}
NCCL ncclReduceScatter(
    const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op, ncclComm_t c, cudaStream_t) {
    size_t bytes = count * width(type);
    return start(c, "ReduceScatter", bytes * c->size, [=] {
        memcpy(c->slot(c->rank), from, bytes * c->size);
        c->barrier();
        auto result = combined(c, bytes * c->rank, count, type, op);
        c->barrier();
        memcpy(to, result.data(), bytes);
    });
}
NCCL ncclBroadcast(
    const void* from, void* to, size_t count, ncclDataType_t type, int root, ncclComm_t c, cudaStream_t) {
    size_t bytes = count * width(type);
    return start(c, "Broadcast", bytes, [=] {
        if (c->rank == root) memcpy(c->slot(root), from, bytes);
        c->barrier();
        memcpy(to, c->slot(root), bytes);
        c->barrier();
    });
}
NCCL ncclBcast(void* data, size_t count, ncclDataType_t type, int root, ncclComm_t c, cudaStream_t stream) {
    return ncclBroadcast(data, data, count, type, root, c, stream);
}
NCCL ncclAllGather(const void* from, void* to, size_t count, ncclDataType_t type, ncclComm_t c, cudaStream_t) {
    size_t bytes = count * width(type);
    return start(c, "AllGather", bytes, [=] {
        memcpy(c->slot(c->rank), from, bytes);
        c->barrier();
        for (int rank = 0; rank < c->size; rank++) memcpy(static_cast<char*>(to) + rank * bytes, c->slot(rank), bytes);
        c->barrier();
    });
}
NCCL ncclSend(const void* data, size_t count, ncclDataType_t type, int peer, ncclComm_t c, cudaStream_t) {
    return post({c, true, const_cast<void*>(data), count * width(type), peer}, "Send");
}
NCCL ncclRecv(void* data, size_t count, ncclDataType_t type, int peer, ncclComm_t c, cudaStream_t) {
    return post({c, false, data, count * width(type), peer}, "Recv");
}
}
