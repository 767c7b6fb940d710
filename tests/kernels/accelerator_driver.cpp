// Runs the operations of accelerator.cpp on fixed inputs and prints a hash of each result. See `driver.hpp`.
//
// Usage: driver THREADS ROUNDS [nested]. Exit status 1: the number of threads changed a result. With `nested` a run of the
// thread pool calls another one, which must abort the process.

#include "../../src/afterword/engine/kernels/accelerator.cpp"

#include "driver.hpp"

void run_sampler(const Options &options, void *run);

namespace {

Tensor tensor_of(int type, size_t element, const void *data, int64_t ne0, int64_t ne1 = 1, int64_t ne2 = 1, int64_t ne3 = 1) {
    Tensor made = {};
    const int64_t ne[4] = {ne0, ne1, ne2, ne3};
    made.type = type, made.data = (char *)data;
    for (int i = 0; i < 4; i++) {
        made.ne[i] = ne[i];
        made.nb[i] = i ? made.nb[i - 1] * (size_t)ne[i - 1] : element;
    }
    return made;
}

Tensor floats_of(const std::vector<float> &data, int64_t ne0, int64_t ne1 = 1, int64_t ne2 = 1, int64_t ne3 = 1) {
    return tensor_of(F32, sizeof(float), data.data(), ne0, ne1, ne2, ne3);
}

void compute_or_exit(const char *name, const Tensor &node, int count) {
    if (!operation_supports(name, &node)) std::printf("%s refuses its operands\n", name), std::exit(2);
    operation_compute(name, &node, count);
}

// ---- matmul

struct WeightType {
    const char *name;
    int id, elements, bytes;  // of a block
    std::vector<int> scales;  // offsets of the halves that scale a block
    uint16_t least_half;      // 0: not a type of halves
};

const WeightType WEIGHT_TYPES[] = {
    {"Q8_0", 8, 32, 34, {0}, 0},      {"Q4_0", 2, 32, 18, {0}, 0},       {"Q4_1", 3, 32, 20, {0, 2}, 0},
    {"Q5_0", 6, 32, 22, {0}, 0},      {"Q5_1", 7, 32, 24, {0, 2}, 0},    {"IQ4_NL", 20, 32, 18, {0}, 0},
    {"IQ4_XS", 23, 256, 136, {0}, 0}, {"MXFP4", 39, 32, 17, {}, 0},      {"Q2_K", 10, 256, 84, {80, 82}, 0},
    {"Q3_K", 11, 256, 110, {108}, 0}, {"Q4_K", 12, 256, 144, {0, 2}, 0}, {"Q5_K", 13, 256, 176, {0, 2}, 0},
    {"Q6_K", 14, 256, 210, {208}, 0}, {"F16", 1, 1, 2, {}, 0x2800},      {"BF16", 30, 1, 2, {}, 0x3800},
    {"F32", 0, 1, 4, {}, 0},
};

std::vector<char> weights_of(const WeightType &type, int64_t rows, int64_t length) {
    Random random(type.id + 1);
    std::vector<char> made(rows * length / type.elements * type.bytes);
    for (char &x : made) x = (char)random.bits();
    for (size_t block = 0; block < made.size(); block += type.bytes) {
        const float plain = random.number();
        uint16_t half = random.half(type.least_half);
        if (type.bytes == 4) std::memcpy(&made[block], &plain, 4);
        else if (type.least_half) std::memcpy(&made[block], &half, 2);
        if (type.id == products::MXFP4::ID) made[block] = (char)(120 | (made[block] & 7));
        for (const int at : type.scales) half = random.half(0x1800), std::memcpy(&made[block + at], &half, 2);
    }
    return made;
}

// Activations [column][element]. The first column has a piece of zeros; the third has a NaN and an infinity.
std::vector<float> activations_of(int64_t columns, int64_t length) {
    Random random(99);
    std::vector<float> made(columns * length);
    for (size_t i = 0; i < made.size(); i++) made[i] = i / 32 == 1 ? 0 : random.number();
    if (columns > 2) made[2 * length + 5] = __builtin_nanf(""), made[2 * length + 40] = -__builtin_inff();
    return made;
}

Buffer *fake_make_buffer(BufferType *type, BufferCalls calls, void *context, size_t size) {
    return new Buffer{calls, type, context, size, 0};
}

void run_matmul(const Options &options) {
    constexpr int64_t ROWS = 77, LENGTH = 768;
    if (!accelerator_supports_quantized()) return;
    for (const WeightType &type : WEIGHT_TYPES) {
        const std::vector<char> file = weights_of(type, ROWS, LENGTH);
        Tensor weights = tensor_of(type.id, type.bytes, file.data(), LENGTH, ROWS);
        weights.nb[1] = LENGTH / type.elements * type.bytes;
        Tensor packed = weights;
        Buffer *const buffer = memory::buffer_type->calls.make_buffer(memory::buffer_type, products::packed_size(&weights));
        packed.buffer = buffer, packed.data = (char *)buffer->calls.get_base(buffer);
        buffer->calls.clear(buffer, 0);
        // In two parts that end within a group of rows.
        const size_t row = weights.nb[1], part = 21 * row;
        buffer->calls.set_tensor(buffer, &packed, file.data(), 0, part);
        buffer->calls.set_tensor(buffer, &packed, file.data() + part, part, file.size() - part);
        std::vector<char> back(file.size());
        buffer->calls.get_tensor(buffer, &packed, back.data(), 0, back.size());
        if (back != file) std::printf("%s: packed weights changed\n", type.name), std::exit(1);
        for (const int64_t columns : {0, 1, 2, 3, 4, 7, 20}) {
            const std::vector<float> x = activations_of(columns, LENGTH);
            for (const Tensor *matrix : {&weights, &packed})
                report("matmul/" + std::string(type.name) + (matrix == &packed ? "/packed/" : "/file/") + std::to_string(columns),
                       options, [&](int count) {
                           std::vector<float> out(ROWS * columns);
                           Tensor operand = floats_of(x, LENGTH, columns), first = *matrix, node = floats_of(out, ROWS, columns);
                           node.src[0] = &first, node.src[1] = &operand;
                           compute_or_exit("MUL_MAT", node, count);
                           Hash hash;
                           hash.add(out);
                           return hash.result();
                       });
        }
        buffer->calls.free(buffer);
        delete buffer;
    }
}

// ---- several matrices in one tensor, in the order of the file and packed

struct Matrices {
    const std::vector<char> file;
    Tensor weights, packed;
    Matrices(const WeightType &type, int64_t count, int64_t rows, int64_t length)
        : file(weights_of(type, count * rows, length)),
          weights(tensor_of(type.id, type.bytes, file.data(), length, rows, count)) {
        weights.nb[1] = length / type.elements * type.bytes, weights.nb[2] = rows * weights.nb[1], weights.nb[3] = file.size();
        packed = weights;
        Buffer *const buffer = memory::buffer_type->calls.make_buffer(memory::buffer_type, products::packed_size(&weights));
        packed.buffer = buffer, packed.data = (char *)buffer->calls.get_base(buffer);
        buffer->calls.clear(buffer, 0);
        buffer->calls.set_tensor(buffer, &packed, file.data(), 0, file.size());
    }
    Matrices(const Matrices &) = delete;
    ~Matrices() {
        packed.buffer->calls.free(packed.buffer);
        delete packed.buffer;
    }
};

// ---- matmul of selected experts: some experts are selected often, expert 1 once and the last one never

void run_expert_matmul(const Options &options) {
    constexpr int64_t EXPERTS = 6, ROWS = 48, LENGTH = 512, USED = 3;
    if (!accelerator_supports_quantized()) return;
    for (const WeightType &type : WEIGHT_TYPES) {
        const Matrices made(type, EXPERTS, ROWS, LENGTH);
        for (const int64_t tokens : {1, 9})
            for (const int64_t operands : {(int64_t)1, USED}) {
                const std::vector<float> x = activations_of(tokens * operands, LENGTH);
                std::vector<int32_t> ids(tokens * USED);
                for (size_t i = 0; i < ids.size(); i++) ids[i] = i == 1 ? 1 : i % USED ? 2 + (int32_t)(i % 3) : 0;
                for (const Tensor *matrices : {&made.weights, &made.packed})
                    report("experts/" + std::string(type.name) + (matrices == &made.packed ? "/packed/" : "/file/") +
                               std::to_string(tokens) + "/" + std::to_string(operands),
                           options, [&](int count) {
                               std::vector<float> out(ROWS * USED * tokens);
                               Tensor operand = floats_of(x, LENGTH, operands, tokens), first = *matrices;
                               Tensor selected = tensor_of(I32, 4, ids.data(), USED, tokens);
                               Tensor node = floats_of(out, ROWS, USED, tokens);
                               node.src[0] = &first, node.src[1] = &operand, node.src[2] = &selected;
                               compute_or_exit("MUL_MAT_ID", node, count);
                               Hash hash;
                               hash.add(out);
                               return hash.result();
                           });
            }
    }
}

// ---- one matrix for each head

void run_head_matmul(const Options &options) {
    constexpr int64_t HEADS = 3, ROWS = 48, LENGTH = 512;
    if (!accelerator_supports_quantized()) return;
    for (const WeightType &type : WEIGHT_TYPES) {
        const Matrices made(type, HEADS, ROWS, LENGTH);
        for (const int64_t tokens : {1, 5})
            for (const int64_t streams : {1, 2}) {
                const std::vector<float> x = activations_of(HEADS * tokens * streams, LENGTH);
                for (const Tensor *matrices : {&made.weights, &made.packed})
                    report("heads/" + std::string(type.name) + (matrices == &made.packed ? "/packed/" : "/file/") +
                               std::to_string(tokens) + "/" + std::to_string(streams),
                           options, [&](int count) {
                               std::vector<float> out(ROWS * HEADS * tokens * streams);
                               Tensor operand = floats_of(x, LENGTH, HEADS, tokens, streams), first = *matrices;
                               std::swap(operand.ne[1], operand.ne[2]), std::swap(operand.nb[1], operand.nb[2]);
                               Tensor node = floats_of(out, ROWS, tokens, HEADS, streams);
                               node.src[0] = &first, node.src[1] = &operand;
                               compute_or_exit("MUL_MAT", node, count);
                               Hash hash;
                               hash.add(out);
                               return hash.result();
                           });
            }
    }
}

// ---- products with short columns

void run_short_matmul(const Options &options) {
    constexpr int64_t LENGTH = 4, ROWS = 70, COLUMNS = 5, TOKENS = 200;
    Random random(8);
    const std::vector<float> matrices = random.numbers(LENGTH * ROWS * TOKENS), x = random.numbers(LENGTH * COLUMNS * TOKENS);
    for (const int64_t count_of_matrices : {(int64_t)1, TOKENS})
        report("short/" + std::to_string(count_of_matrices), options, [&](int count) {
            std::vector<float> out(ROWS * COLUMNS * TOKENS);
            Tensor first = floats_of(matrices, LENGTH, ROWS, count_of_matrices), operand = floats_of(x, LENGTH, COLUMNS, TOKENS);
            Tensor node = floats_of(out, ROWS, COLUMNS, TOKENS);
            first.op = 1, node.src[0] = &first, node.src[1] = &operand;
            compute_or_exit("MUL_MAT", node, count);
            Hash hash;
            hash.add(out);
            return hash.result();
        });
}

// ---- attention

struct AttentionCase {
    const char *name;
    int64_t streams, heads, kv_heads, tokens, cells, dk, dv;
    float steepness, cap;
    bool masked, broken;  // broken: masked cells hold NaN
    int64_t window = 0;   // 0: none
    std::vector<float> sinks = {};
};

const AttentionCase ATTENTION_CASES[] = {
    {"one token", 1, 4, 2, 1, 300, 64, 64, 0, 0, true, false},
    {"several tokens", 1, 4, 2, 9, 256, 64, 64, 0, 0, true, false},
    {"many tokens", 1, 4, 2, 71, 300, 64, 64, 0, 0, true, true},
    {"streams", 3, 7, 1, 2, 77, 128, 128, 0, 0, true, false},
    {"odd heads", 1, 4, 4, 9, 77, 80, 72, 8, 5, true, true},
    {"no mask", 1, 4, 2, 9, 77, 64, 64, 0, 0, false, false},
    {"latent", 2, 5, 1, 9, 300, 576, 512, 0, 0, true, true},
    {"sinks and a window", 1, 4, 2, 71, 700, 64, 64, 0, 0, true, true, 90, {0.5f, -2, 40, -INFINITY}},
};

void run_attention(const Options &options) {
    for (const AttentionCase &c : ATTENTION_CASES) {
        Random random(7);
        const std::vector<float> q = random.numbers(c.streams * c.heads * c.tokens * c.dk, 2);
        std::vector<half> k(c.streams * c.kv_heads * c.cells * c.dk), v(c.streams * c.kv_heads * c.cells * c.dv);
        std::vector<half> mask(c.streams * c.tokens * c.cells);
        for (half &x : k) x = random.half(0x3000);
        for (half &x : v) x = random.half(0x3400);
        // A token sees the cells up to its own, which is near the middle, or the last of them.
        const auto hidden = [&](int64_t token, int64_t cell) {
            return cell > c.cells / 2 + token || (c.window && cell <= c.cells / 2 + token - c.window);
        };
        for (size_t i = 0; i < mask.size(); i++)
            mask[i] = hidden(i / c.cells % c.tokens, i % c.cells) ? 0xfc00 : i % 3 ? 0 : 0xb800;
        for (size_t i = 0; c.broken && i < v.size(); i++)
            if (hidden(c.tokens - 1, i / c.dv % c.cells)) v[i] = 0x7e00;
        report(std::string("attention/") + c.name, options, [&](int count) {
            std::vector<float> out(c.streams * c.tokens * c.heads * c.dv);
            Tensor queries = floats_of(q, c.dk, c.tokens, c.heads, c.streams),
                   node = floats_of(out, c.dv, c.heads, c.tokens, c.streams);
            Tensor keys = tensor_of(F16, 2, k.data(), c.dk, c.cells, c.kv_heads, c.streams);
            Tensor values = tensor_of(F16, 2, v.data(), c.dv, c.cells, c.kv_heads, c.streams);
            Tensor seen = tensor_of(F16, 2, mask.data(), c.cells, c.tokens, 1, c.streams);
            node.src[0] = &queries, node.src[1] = &keys, node.src[2] = &values, node.src[3] = c.masked ? &seen : nullptr;
            Tensor sinks = floats_of(c.sinks, c.heads);
            node.src[4] = c.sinks.empty() ? nullptr : &sinks;
            const float params[3] = {0.125f, c.steepness, c.cap};
            std::memcpy(node.params, params, sizeof params);
            compute_or_exit("FLASH_ATTN_EXT", node, count);
            Hash hash;
            hash.add(out);
            return hash.result();
        });
    }
}

// ---- elementwise

void set_float(Tensor &node, int i, float x) { std::memcpy(&node.params[i], &x, sizeof x); }

struct ElementwiseCase {
    const char *name, *operation;
    const Tensor *sources[3];
    int integers[6];  // the last one is parameter 15
    float floats[11];
};

void run_elementwise(const Options &options) {
    constexpr int64_t WIDTH = 96, HEADS = 4, TOKENS = 200, COUNT = WIDTH * HEADS * TOKENS;
    Random random(3);
    const std::vector<float> x = random.numbers(COUNT, 32), y = random.numbers(COUNT), few = random.numbers(WIDTH);
    std::vector<float> slower(WIDTH / 2);
    for (size_t i = 0; i < slower.size(); i++) slower[i] = 1 + (float)i / 4;
    std::vector<int32_t> positions(TOKENS);
    for (int64_t i = 0; i < TOKENS; i++) positions[i] = (int32_t)(i * 157);
    const Tensor a = floats_of(x, WIDTH, HEADS, TOKENS), b = floats_of(y, WIDTH, HEADS, TOKENS), row = floats_of(few, WIDTH);
    const Tensor at = tensor_of(I32, 4, positions.data(), TOKENS), factors = floats_of(slower, WIDTH / 2);
    const ElementwiseCase cases[] = {
        {"norm", "RMS_NORM", {&a}, {}, {1e-6f}},
        {"centred norm", "NORM", {&a}, {}, {1e-6f}},
        {"sum", "ADD", {&a, &b}, {}, {}},
        {"difference", "SUB", {&a, &b}, {}, {}},
        {"product", "MUL", {&a, &row}, {}, {}},
        {"quotient", "DIV", {&a, &row}, {}, {}},
        {"softmax", "SOFT_MAX", {&a}, {}, {0.75f}},
        {"sigmoid", "UNARY", {&a}, {activations::Sigmoid::UNARY}, {}},
        {"limits", "CLAMP", {&a}, {}, {-0.5f, 0.5f}},
        {"factor", "SCALE", {&a}, {}, {0.7f}},
        {"factor and term", "SCALE", {&a}, {}, {0.7f, 0.3f}},
        {"gate", "GLU", {&a, &b}, {activations::SiLU::GLU}, {}},
        {"gate of ReLU", "GLU", {&a, &b}, {activations::ReLU::GLU}, {}},
        {"gate of GELU", "GLU", {&a, &b}, {activations::GELU::GLU}, {}},
        {"gate of the error function", "GLU", {&a, &b}, {activations::ErrorGELU::GLU}, {}},
        {"quick gate", "GLU", {&a, &b}, {activations::QuickGELU::GLU}, {}},
        {"limited gate", "GLU", {&a, &b}, {activations::LimitedSwiGLU::GLU}, {0, 0, 0, 7}},
        {"limited gate plus one", "GLU", {&a, &b}, {activations::LimitedSwiGLUPlusOne::GLU}, {0, 0, 1.702f, 7}},
        {"tanh", "UNARY", {&a}, {activations::Tanh::UNARY}, {}},
        {"ReLU", "UNARY", {&a}, {activations::ReLU::UNARY}, {}},
        {"GELU", "UNARY", {&a}, {activations::GELU::UNARY}, {}},
        {"quick GELU", "UNARY", {&a}, {activations::QuickGELU::UNARY}, {}},
        {"SiLU", "UNARY", {&a}, {activations::SiLU::UNARY}, {}},
        {"GELU by the error function", "UNARY", {&a}, {activations::ErrorGELU::UNARY}, {}},
        {"square", "SQR", {&a}, {}, {}},
        {"softplus", "UNARY", {&a}, {activations::SoftPlus::UNARY}, {}},
        {"root", "SQRT", {&a}, {}, {}},
        {"rotary in halves", "ROPE", {&a, &at}, {0, WIDTH, elementwise::IN_HALVES}, {0, 0, 0, 0, 0, 10000, 1, 0, 1}},
        {"rotary in pairs", "ROPE", {&a, &at, &factors}, {0, 64, elementwise::IN_PAIRS}, {0, 0, 0, 0, 0, 10000, 0.5f, 0, 1.5f}},
        {"rotary of the last elements", "ROPE", {&a, &at}, {0, 32, 0, 0, 4096, 64}, {0, 0, 0, 0, 0, 10000, 0.25f, 1, 1, 32, 1}},
    };
    for (const ElementwiseCase &c : cases)
        report(std::string("elementwise/") + c.name, options, [&](int count) {
            std::vector<float> out(COUNT);
            Tensor node = floats_of(out, WIDTH, HEADS, TOKENS);
            for (int i = 0; i < 11; i++)
                if (c.floats[i] != 0) set_float(node, i, c.floats[i]);
            for (int i = 0; i < 3; i++) node.src[i] = const_cast<Tensor *>(c.sources[i]);
            for (int i = 0; i < 5; i++)
                if (c.integers[i]) node.params[i] = c.integers[i];
            node.params[elementwise::Rope::FIRST_TURNED] = c.integers[5];
            compute_or_exit(c.operation, node, count);
            Hash hash;
            hash.add(out);
            return hash.result();
        });
    report("routing/sorted", options, [&](int count) {
        std::vector<int32_t> out(COUNT);
        Tensor from = a, node = tensor_of(I32, 4, out.data(), WIDTH, HEADS, TOKENS);
        node.src[0] = &from, node.params[0] = routing::DESCENDING;
        compute_or_exit("ARGSORT", node, count);
        Hash hash;
        hash.add(out);
        return hash.result();
    });
    report("routing/first of the sorted", options, [&](int count) {
        std::vector<int32_t> out(5 * HEADS * TOKENS);
        Tensor from = a, node = tensor_of(I32, 4, out.data(), 5, HEADS, TOKENS);
        node.src[0] = &from;
        compute_or_exit("TOP_K", node, count);
        Hash hash;
        hash.add(out);
        return hash.result();
    });
    for (const char *operation : {"SUM_ROWS", "MEAN"})
        report(std::string("routing/") + operation, options, [&](int count) {
            std::vector<float> out(HEADS * TOKENS);
            Tensor from = a, node = floats_of(out, 1, HEADS, TOKENS);
            node.src[0] = &from;
            compute_or_exit(operation, node, count);
            Hash hash;
            hash.add(out);
            return hash.result();
        });
    for (const char *operation : {"CONT", "CPY", "CONCAT", "REPEAT", "FILL"})
        report(std::string("copies/") + operation, options, [&](int count) {
            std::vector<float> out(2 * COUNT);
            Tensor from = a, other = b, node = floats_of(out, 2 * WIDTH, HEADS, TOKENS);
            node.src[0] = &from, node.src[1] = &other;
            if (!std::strcmp(operation, "CONT") || !std::strcmp(operation, "CPY")) {  // heads and tokens change places
                std::swap(from.ne[1], from.ne[2]), std::swap(from.nb[1], from.nb[2]);
                node = floats_of(out, WIDTH, TOKENS, HEADS), node.src[0] = &from;
            }
            compute_or_exit(operation, node, count);
            Hash hash;
            hash.add(out);
            return hash.result();
        });
    report("elementwise/floats to halves", options, [&](int count) {  // floats of every kind: subnormal, infinite, NaN
        std::vector<float> all_kinds(64 * 2048);
        for (size_t i = 0; i < all_kinds.size(); i++) {
            const uint32_t bits = (uint32_t)(i * 32771);
            std::memcpy(&all_kinds[i], &bits, 4);
        }
        std::vector<int64_t> rows(2048);
        for (size_t i = 0; i < rows.size(); i++) rows[i] = (int64_t)(2047 - i);
        std::vector<half> out(all_kinds.size());
        Tensor from = floats_of(all_kinds, 64, 2048), where = tensor_of(I64, 8, rows.data(), 2048);
        Tensor node = tensor_of(F16, 2, out.data(), 64, 2048);
        node.src[0] = &from, node.src[1] = &where;
        compute_or_exit("SET_ROWS", node, count);
        for (half &one : out)
            if ((one & 0x7fff) > 0x7c00) one = 0x7e00;
        Hash hash;
        hash.add(out);
        return hash.result();
    });
    report("elementwise/rows", options, [&](int count) {
        const std::vector<int32_t> rows = {8, 0, 3, 3};
        std::vector<float> out(4 * WIDTH);
        Tensor from = floats_of(x, WIDTH, HEADS * TOKENS), which = tensor_of(I32, 4, rows.data(), 4);
        Tensor node = floats_of(out, WIDTH, 4);
        node.src[0] = &from, node.src[1] = &which;
        compute_or_exit("GET_ROWS", node, count);
        Hash hash;
        hash.add(out);
        return hash.result();
    });
}

// ---- recurrent layers

void run_convolution(const Options &options) {
    constexpr int64_t CHANNELS = 70, SEQUENCES = 3, TAPS = 4;
    for (const int64_t tokens : {1, 9, 200}) {
        Random random(11);
        const std::vector<float> x = random.numbers((TAPS - 1 + tokens) * CHANNELS * SEQUENCES), w = random.numbers(TAPS * CHANNELS);
        report("recurrence/convolution/" + std::to_string(tokens), options, [&](int count) {
            std::vector<float> out(CHANNELS * tokens * SEQUENCES);
            Tensor first = floats_of(x, TAPS - 1 + tokens, CHANNELS, SEQUENCES), weights = floats_of(w, TAPS, CHANNELS);
            Tensor node = floats_of(out, CHANNELS, tokens, SEQUENCES);
            node.src[0] = &first, node.src[1] = &weights;
            compute_or_exit("SSM_CONV", node, count);
            Hash hash;
            hash.add(out);
            return hash.result();
        });
    }
}

const char *const GRAPH_OPERATIONS[] = {"RESHAPE", "GET_ROWS", "GATED_DELTA_NET", "CPY", "SCALE"};
enum { DESCRIBE, GATHER, NET, WRITE, FACTOR };

// A delta net as llama.cpp builds it: the states are gathered from the rows of a cache and written to its rows 1 to SEQUENCES.
class NetGraph {
    static constexpr int64_t LENGTH = 32, HEADS = 2, SEQUENCES = 3, CELLS = 6, SIZE = LENGTH * LENGTH * HEADS;
    const int64_t tokens;
    std::vector<float> q, k, v, g, b, cache;
    std::vector<float> gathered = std::vector<float>(SIZE * SEQUENCES, 7), result;
    const std::vector<int32_t> rows;
    Tensor tensors[14];
    std::vector<Tensor *> nodes;

    static Tensor view_of(Tensor &x, char *data, int64_t ne0, int64_t ne1, int64_t ne2 = 1, int64_t ne3 = 1) {
        Tensor view = tensor_of(F32, sizeof(float), data, ne0, ne1, ne2, ne3);
        view.src[0] = view.view_src = &x, view.view_offset = data - x.data;
        return view;
    }

   public:
    // `reads_again`: another node reads the gathered states, so they must be gathered.
    NetGraph(int64_t tokens, const std::vector<int32_t> &rows, bool reads_again = false) : tokens(tokens), rows(rows) {
        Random random(12);
        const int64_t vectors = HEADS * tokens * SEQUENCES;
        q = random.numbers(vectors * LENGTH, 0.25f), k = random.numbers(vectors * LENGTH, 0.25f);
        v = random.numbers(vectors * LENGTH), g = random.numbers(vectors, 0.125f), b = random.numbers(vectors, 0.5f);
        cache = random.numbers(SIZE * CELLS), result.resize(vectors * LENGTH + SIZE * SEQUENCES);
        Tensor *const made = tensors;
        made[0] = floats_of(q, LENGTH, HEADS, tokens, SEQUENCES), made[1] = floats_of(k, LENGTH, HEADS, tokens, SEQUENCES);
        made[2] = floats_of(v, LENGTH, HEADS, tokens, SEQUENCES), made[3] = floats_of(g, 1, HEADS, tokens, SEQUENCES);
        made[4] = floats_of(b, 1, HEADS, tokens, SEQUENCES), made[5] = floats_of(cache, SIZE, CELLS);
        made[6] = tensor_of(I32, 4, this->rows.data(), SEQUENCES);
        Tensor &gather = made[7] = floats_of(gathered, SIZE, SEQUENCES);
        gather.op = GATHER, gather.src[0] = &made[5], gather.src[1] = &made[6];
        made[8] = view_of(gather, gather.data, LENGTH, LENGTH, HEADS, SEQUENCES);
        Tensor &net = made[9] = floats_of(result, LENGTH * HEADS, tokens * SEQUENCES + LENGTH * SEQUENCES);
        net.op = NET, net.params[0] = 1;
        for (int i = 0; i < 5; i++) net.src[i] = &made[i];
        net.src[5] = &made[8];
        made[10] = view_of(net, net.data + vectors * LENGTH * sizeof(float), LENGTH, LENGTH, HEADS, SEQUENCES);
        Tensor &write = made[11] = view_of(made[5], made[5].data + SIZE * sizeof(float), SIZE, SEQUENCES);
        write.op = WRITE, write.src[0] = &made[10];
        made[12] = view_of(net, net.data, LENGTH, HEADS, tokens, SEQUENCES);
        Tensor &again = made[13] = view_of(gather, gather.data, SIZE, SEQUENCES);
        again.op = FACTOR;
        const float factors[2] = {2, 0};
        std::memcpy(again.params, factors, sizeof factors);
        nodes = {&gather, &made[8], &net, &made[10], &write, &made[12]};
        if (reads_again) nodes.push_back(&again);
        for (Tensor *node : nodes) node->flags = TO_COMPUTE;
    }

    void compute_each(int count) const {
        for (const Tensor *node : nodes)
            if (node->op != DESCRIBE) compute_or_exit(GRAPH_OPERATIONS[node->op], *node, count);
    }
    void compute_together(int count) {
        threads = count;
        compute_graph(nullptr, (Graph *)&nodes);
    }
    // The cache, and the results of tokens.
    uint64_t hash() const {
        Hash hash;
        hash.add(cache), hash.add(result.data(), HEADS * tokens * SEQUENCES * LENGTH);
        return hash.result();
    }
    bool gathers() const { return gathered[0] != 7; }
};

void run_delta_net(const Options &options) {
    ggml.graph_size = [](Graph *graph) { return (int)((std::vector<Tensor *> *)graph)->size(); };
    ggml.graph_node = [](Graph *graph, int i) { return (*(std::vector<Tensor *> *)graph)[i]; };
    ggml.operation_name = [](int operation) { return GRAPH_OPERATIONS[operation]; };
    struct Case {
        const char *name;
        std::vector<int32_t> rows;
        bool reads_again, gathers;
    };
    for (const Case &c : {Case{"in place", {1, 2, 3}, false, false}, Case{"moved", {2, 1, 5}, false, true},
                          Case{"read again", {1, 2, 3}, true, true}})
        for (const int64_t tokens : {1, 21})
            report("recurrence/delta net/" + std::string(c.name) + "/" + std::to_string(tokens), options, [&](int count) {
                NetGraph each(tokens, c.rows, c.reads_again), together(tokens, c.rows, c.reads_again);
                each.compute_each(count), together.compute_together(count);
                if (each.hash() != together.hash()) std::printf("%s: other bits in the cache\n", c.name), std::exit(1);
                if (together.gathers() != c.gathers) std::printf("%s: states were or were not gathered\n", c.name), std::exit(1);
                return together.hash();
            });
}

}  // namespace

int main(int count, char **arguments) {
    if (count < 3) return 2;
    const Options options{std::atoi(arguments[1]), std::atoi(arguments[2])};
    ggml.make_buffer = fake_make_buffer;
    accelerator_configure(options.threads, 1);
    void *const run = accelerator_use_thread_pool(1);
    if (count > 3) run_threads(2, [](int) { return run_threads(2, [](int) { return MemoryRange{}; }), MemoryRange{}; });
    run_matmul(options);
    run_expert_matmul(options);
    run_head_matmul(options);
    run_short_matmul(options);
    run_attention(options);
    run_elementwise(options);
    run_convolution(options);
    run_delta_net(options);
    run_sampler(options, run);
}
