// steps LIBRARY PLAIN TOKENS BLOCKS BACKWARDS GROUPED RANK: a step of a small model, by the emulated kernel in the library (steps.py) and by a
// plain forward pass in f64.
#include "steps.h"
#include "structures.h"
#include <dlfcn.h>

typedef std::vector<double> Row;
enum { FEWEST_RANKS = 64, TABLE_OF_PAGES = 4, PAGE = 16, MOST_TOKENS = 32, HEAD = 64, LAYERS = 2, HIDDEN = 512 };
const float LEVELS[16] = {-1.0f, -0.6961928f, -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f, -0.091050036f, 0.0f,
                          0.0795803f, 0.1609302f, 0.2461123f, 0.33791524f, 0.44070983f, 0.562617f, 0.72295684f, 1.0f};
// Rounding of activations to bf16 explains so much, relative to the root of the mean square of the logits.
const double BOUND = 0.005;

static u32 state = 12345;
static float random_float() {
  state = state * 1664525u + 1013904223u;
  return (state >> 8) * (1.0f / 8388608.0f) - 1.0f;
}
static u16 bf16(float x) {
  u32 b = __float_as_uint(x);
  return (u16)((b + 0x7fffu + (b >> 16 & 1u)) >> 16);
}
static double value_of(u16 x) { return __uint_as_float((u32)x << 16); }

// Memory that is not given back: the program ends soon.
template <class T> T *room(size_t count, int byte = 0) {
  size_t bytes = (count * sizeof(T) + 511) / 256 * 256;
  return (T *)memset(aligned_alloc(256, bytes), byte, bytes);
}
static u16 *random_halves(size_t count, float scale, float middle = 0) {
  u16 *values = room<u16>(count);
  for (size_t i = 0; i < count; i++) values[i] = bf16(random_float() * scale + middle);
  return values;
}

// A layer: y = x W^T + scale (x A^T) B^T, with W and the factors in f64 for the reference.
struct Layer {
  Part part;
  int inner;
  std::vector<double> weight, a, b;

  Row operator()(const Row &x) const {
    Row low(part.rank), y(part.rows);
    for (int r = 0; r < part.rank; r++)
      for (int i = 0; i < inner; i++) low[r] += a[r * inner + i] * x[i];
    for (int row = 0; row < part.rows; row++) {
      for (int i = 0; i < inner; i++) y[row] += weight[row * inner + i] * x[i];
      for (int r = 0; r < part.rank; r++) y[row] += part.lora_scale * b[row * part.rank + r] * low[r];
    }
    return y;
  }
};

static std::vector<double> values_of(const u16 *halves, size_t count) {
  std::vector<double> values(count);
  for (size_t i = 0; i < count; i++) values[i] = value_of(halves[i]);
  return values;
}

static Layer dense_layer(int rows, int inner) {
  Layer layer = {};
  layer.inner = inner;
  layer.part.rows = rows;
  layer.part.dense = random_halves((size_t)rows * inner, 0.05f);
  layer.weight = values_of(layer.part.dense, (size_t)rows * inner);
  return layer;
}

// Codes of the scales' levels are random, some of them for a scale of 0.
static Layer packed_layer(int rows, int inner, int rank, bool plain, const float *dynamic) {
  Layer layer = {};
  size_t count = (size_t)rows * inner, scales = count / 64;
  auto codes = room<unsigned char>(count / 2), scale_codes = room<unsigned char>(scales);
  auto of = room<float>(plain ? scales : scales / 256 + 1), offset = room<float>(1);
  for (size_t i = 0; i < count / 2; i++) random_float(), codes[i] = state >> 13;
  for (size_t i = 0; i < scales; i++) random_float(), scale_codes[i] = i % 37 ? state >> 13 : 128;
  for (size_t i = 0; i < (plain ? scales : scales / 256 + 1); i++) of[i] = plain && i % 37 == 0 ? 0.0f : 0.04f + 0.02f * random_float();
  layer.inner = inner;
  layer.part.rows = rows;
  layer.part.codes = codes;
  layer.part.scale_codes = plain ? nullptr : scale_codes;
  layer.part.scales = of;
  layer.part.offset = plain ? nullptr : offset;
  for (size_t i = 0; i < count; i++) {
    double scale = plain ? of[i / 64] : dynamic[scale_codes[i / 64]] * of[i / 64 / 256];
    int code = i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4;
    layer.weight.push_back(value_of(bf16(LEVELS[code])) * scale);
  }
  if (rank == 0) return layer;
  layer.part.rank = rank;
  layer.part.lora_scale = 0.5f;
  layer.part.a = random_halves((size_t)rank * inner, 0.05f);
  layer.part.b = random_halves((size_t)rows * rank, 0.05f);
  layer.a = values_of(layer.part.a, (size_t)rank * inner);
  layer.b = values_of(layer.part.b, (size_t)rows * rank);
  return layer;
}

struct Block {
  Layer q, k, v, o, gate, up, down;
  u16 *keys, *values;   // pages
};

struct Model {
  int heads = 8, key_heads, width, vocabulary, pages = MOST_TOKENS * TABLE_OF_PAGES;
  u16 *embedding, *norm;
  float *dynamic = room<float>(256);
  std::vector<Block> blocks;
  Layer head;

  Model(bool grouped, int rank, bool plain) : key_heads(grouped ? 2 : 8), width(grouped ? 768 : 1792), vocabulary(grouped ? 500 : 1003) {
    for (int i = 0; i < 256; i++) dynamic[i] = (i - 128) / 128.0f;
    embedding = random_halves((size_t)vocabulary * HIDDEN, 1.0f);
    norm = random_halves(HIDDEN, 0.1f, 1.0f);
    auto layer = [&](int rows, int inner, int own) { return packed_layer(rows, inner, own, plain, dynamic); };
    int queries = heads * HEAD, keys = key_heads * HEAD;
    for (int l = 0; l < LAYERS; l++) {
      // Two layers have no correction.
      Block block = {layer(queries, HIDDEN, rank), layer(keys, HIDDEN, 0), layer(keys, HIDDEN, rank), layer(HIDDEN, queries, rank),
                     layer(width, HIDDEN, 0), layer(width, HIDDEN, rank), layer(HIDDEN, width, rank)};
      block.keys = random_halves((size_t)pages * PAGE * keys, 1.0f);
      block.values = random_halves((size_t)pages * PAGE * keys, 1.0f);
      blocks.push_back(block);
    }
    head = dense_layer(vocabulary, HIDDEN);
  }
};

static int id_of(const Model &model, int token) { return (token * 37 + 11) % model.vocabulary; }
static int length_of(int token) { return 1 + token * 23 % 60; }
// Pages of a sequence lie in the opposite order.
static int page_of(int token, int page) { return token * TABLE_OF_PAGES + TABLE_OF_PAGES - 1 - page; }

static Row normalised_row(const Model &model, const Row &x) {
  double squares = 0;
  for (double value : x) squares += value * value;
  Row y(x);
  for (size_t i = 0; i < y.size(); i++) y[i] *= value_of(model.norm[i]) / std::sqrt(squares / x.size() + 1e-5);
  return y;
}

static void turn(Row &x, int position) {
  for (size_t begin = 0; begin < x.size(); begin += HEAD)
    for (int i = 0; i < HEAD / 2; i++) {
      double angle = position * std::pow(1e4, -2.0 * i / HEAD), &first = x[begin + i], &second = x[begin + i + HEAD / 2];
      double turned = first * std::cos(angle) - second * std::sin(angle);
      second = second * std::cos(angle) + first * std::sin(angle);
      first = turned;
    }
}

static Row attention(const Model &model, const Block &block, int token, const Row &q, const Row &k, const Row &v) {
  Row result(q.size());
  int position = length_of(token) - 1, keys = model.key_heads * HEAD;
  for (int head = 0; head < model.heads; head++) {
    int shared = head / (model.heads / model.key_heads) * HEAD;
    auto at = [&](const u16 *pages, const Row &now, int place, int i) {
      if (place == position) return now[shared + i];
      return value_of(pages[((size_t)page_of(token, place / PAGE) * PAGE + place % PAGE) * keys + shared + i]);
    };
    double total = 0;
    for (int place = 0; place <= position; place++) {
      double score = 0;
      for (int i = 0; i < HEAD; i++) score += q[head * HEAD + i] * at(block.keys, k, place, i);
      double weight = std::exp(score / std::sqrt((double)HEAD));
      total += weight;
      for (int i = 0; i < HEAD; i++) result[head * HEAD + i] += weight * at(block.values, v, place, i);
    }
    for (int i = 0; i < HEAD; i++) result[head * HEAD + i] /= total;
  }
  return result;
}

static Row logits_of(const Model &model, int token) {
  Row x = values_of(model.embedding + (size_t)id_of(model, token) * HIDDEN, HIDDEN);
  auto add = [&](const Row &more) { std::transform(x.begin(), x.end(), more.begin(), x.begin(), std::plus<double>()); };
  for (const Block &block : model.blocks) {
    Row h = normalised_row(model, x), q = block.q(h), k = block.k(h), v = block.v(h);
    turn(q, length_of(token) - 1);
    turn(k, length_of(token) - 1);
    add(block.o(attention(model, block, token, q, k, v)));
    h = normalised_row(model, x);
    Row gate = block.gate(h), up = block.up(h);
    for (size_t i = 0; i < gate.size(); i++) gate[i] *= up[i] / (1.0 + std::exp(-gate[i]));
    add(block.down(gate));
  }
  return model.head(normalised_row(model, x));
}

static Product product_of(std::initializer_list<const Layer *> layers, int source, int target, const u16 *in, float *to, const u16 *norm) {
  Product p = {};
  int count = 0;
  for (const Layer *layer : layers) {
    Part &part = p.parts[count++] = layer->part;
    part.first_row = p.rows;
    part.first_rank = p.ranks;
    p.rows += part.rows;
    p.ranks += part.rank;
    p.inner = layer->inner;
  }
  for (; count < MOST_PARTS; count++) p.parts[count].first_row = p.parts[count].first_rank = INT32_MAX;
  p.source = source;
  p.target = target;
  p.rows_in = in;
  p.to = to;
  p.norm = norm;
  p.epsilon = 1e-5f;
  return p;
}

static std::vector<Product> products_of(const Model &model, const Step &s) {
  std::vector<Product> products;
  float *joined = (float *)s.joined, *logits = (float *)s.logits;
  for (const Block &block : model.blocks) {
    products.push_back(product_of({&block.q, &block.k, &block.v}, FROM_RESIDUAL, TO_ROWS, nullptr, joined, model.norm));
    products.push_back(product_of({&block.o}, FROM_ATTENTION, TO_RESIDUAL, s.result, s.residual, nullptr));
    products.back().attends = 1;
    products.back().keys = block.keys;
    products.back().values = block.values;
    products.push_back(product_of({&block.gate, &block.up}, FROM_RESIDUAL, TO_ACTIVATED, nullptr, nullptr, model.norm));
    products.push_back(product_of({&block.down}, FROM_ROWS, TO_RESIDUAL, s.activated, s.residual, nullptr));
  }
  products.push_back(product_of({&model.head}, FROM_RESIDUAL, TO_ROWS, nullptr, logits, model.norm));
  return products;
}

static const u32 *pairs_of_levels() {
  u32 *pairs = room<u32>(256);
  for (int i = 0; i < 256; i++) pairs[i] = bf16(LEVELS[i >> 4]) | (u32)bf16(LEVELS[i & 15]) << 16;
  return pairs;
}

static const float2 *turns_of_positions() {
  const int positions = TABLE_OF_PAGES * PAGE;
  float2 *turns = room<float2>(positions * (HEAD / 2));
  for (int i = 0; i < positions * (HEAD / 2); i++) {
    double angle = i / (HEAD / 2) * std::pow(1e4, -2.0 * (i % (HEAD / 2)) / HEAD);
    turns[i] = make_float2(std::sin(angle), std::cos(angle));
  }
  return turns;
}

// A step of n tokens with memory of its own, all of whose results begin as NaN.
static Step step_of(const Model &model, int n, int rank) {
  const int most_ranks = 2 * rank, nan = 0xff;
  Step s = {};
  int *ids = room<int>(n), *lengths = room<int>(n), *tables = room<int>(n * TABLE_OF_PAGES);
  for (int token = 0; token < n; token++) {
    ids[token] = id_of(model, token);
    lengths[token] = length_of(token);
    for (int page = 0; page < TABLE_OF_PAGES; page++) tables[token * TABLE_OF_PAGES + page] = page_of(token, page);
  }
  s.ids = ids, s.lengths = lengths, s.tables = tables;
  s.barrier = room<u32>(1);
  s.embedding = model.embedding;
  s.pairs = pairs_of_levels(), s.dynamic = model.dynamic, s.turns = turns_of_positions();
  s.residual = room<float>(n * HIDDEN, nan), s.normalised = room<u16>(n * HIDDEN, nan), s.activated = room<u16>(n * model.width, nan);
  s.logits = room<float>(n * model.vocabulary, nan), s.choices = room<int>(2 * n, nan);
  s.joined = room<float>(n * (model.heads + 2 * model.key_heads) * HEAD, nan), s.result = room<u16>(n * model.heads * HEAD, nan);
  s.attended = room<float>(n * model.heads * HEAD, nan), s.log_sums = room<float>(n * model.heads, nan);
  s.low_rank = room<long long>(3 * n * most_ranks + 1, nan);
  s.most_tiles = (2 * model.width + 31) / 32;
  // At most 14 groups of columns.
  s.partial = room<float4>((size_t)14 * s.most_tiles * 32 * MOST_TOKENS / 4, nan);
  s.arrived = room<u32>(3 * s.most_tiles, nan), s.squares = room<long long>(3 * MOST_TOKENS * SQUARES_APART, nan);
  s.n = n, s.d = HIDDEN, s.vocabulary = model.vocabulary;
  s.round = 2, s.work_bytes = 67584, s.most_low_rank = n * most_ranks;
  s.table = TABLE_OF_PAGES, s.page_shift = 4, s.heads = model.heads, s.key_heads = model.key_heads, s.splits = 1;
  s.scale = 1.0f / std::sqrt((float)HEAD);
  return s;
}

int main(int, char **arguments) {
  auto number = [&](int i) { return atoi(arguments[i]); };
  int plain = number(2), n = number(3), blocks = number(4), backwards = number(5), grouped = number(6), rank = number(7);
  void *library = dlopen(arguments[1], RTLD_NOW);
  if (!library) return puts(dlerror()), 1;
  auto emulate = (int (*)(const Step *, unsigned, int))dlsym(library, "emulate");
  Model model(grouped, rank, plain);
  std::vector<float> found[2];
  bool chosen = true;
  for (auto &logits : found) {
    Step s = step_of(model, n, rank);
    std::vector<Product> products = products_of(model, s);
    s.products = products.data();
    s.count = products.size();
    if (!emulate(&s, blocks, backwards)) return puts("does not end"), 1;
    logits.assign(s.logits, s.logits + n * model.vocabulary);
    for (int token = 0; token < n; token++) {
      auto row = logits.begin() + token * model.vocabulary;
      auto likeliest = std::max_element(row, row + model.vocabulary);
      double sum = 0;
      for (int i = 0; i < model.vocabulary; i++) sum += std::exp((double)row[i] - *likeliest);
      float log_prob;
      memcpy(&log_prob, &s.choices[n + token], sizeof log_prob);
      chosen = chosen && s.choices[token] == likeliest - row && std::fabs(log_prob + std::log(sum)) < 1e-4;
    }
  }
  double error = 0, size = 0;
  for (int token = 0; token < n; token++) {
    Row expected = logits_of(model, token);
    for (int i = 0; i < model.vocabulary; i++) {
      error += std::pow(found[0][token * model.vocabulary + i] - expected[i], 2);
      size += expected[i] * expected[i];
    }
  }
  double relative = std::sqrt(error / size);
  bool same = !memcmp(found[0].data(), found[1].data(), sizeof(float) * found[0].size()), right = relative <= BOUND && same && chosen;
  printf("tokens %d, blocks %d%s, %s, rank %d: logits within %.2g%s%s%s\n", n, blocks, backwards ? " backwards" : "", grouped ? "heads in groups" : "heads alone", rank,
         relative, same ? "" : ", OTHER BITS", chosen ? "" : ", ANOTHER TOKEN OR LOG-PROBABILITY", right ? "" : " WRONG");
  return !right;
}
