// Every operator of headwise, declared once, here and nowhere else
// (tests/python/ops/test_schemas.py). Kernels register themselves beside their code:
// src/ops/{cpu,cuda,aten,meta,autograd}; composites (no kernel of their own) in src/, by subject.
//
// Shapes: B sequences, L queries, S keys, H heads, Hkv key/value heads, d head width, D model
// width, E = H * d. Masks follow torch.nn.MultiheadAttention: boolean True means 'may not attend',
// a floating mask is added to the scores. index/count/weight are a Selection (selection.h).
#include <torch/library.h>

#include <string>

TORCH_LIBRARY(headwise, m) {
  const auto def = [&](const std::string& schema) { m.def(schema.c_str()); };

  // relevance [B, H], count int [B] -> index int32 [B, H]
  m.def("select_heads(Tensor relevance, Tensor count) -> Tensor");
  // index, count -> [B, H] of ones and zeros
  m.def("selection_mask(Tensor index, Tensor count, ScalarType dtype) -> Tensor");

  // The layer. x [B, L, D], in_proj_weight [3E, D], in_proj_bias [3E], out_proj_weight [D, E],
  // out_proj_bias [D]; key_padding_mask bool or float [B, L]; attn_mask bool or float,
  // broadcastable to [B, H, L, L]; dropout_seed int64 [1], required when dropout_p > 0 -> y [B, L,
  // D]
  m.def(
      "selected_self_attention(Tensor x, Tensor in_proj_weight, Tensor? in_proj_bias, "
      "Tensor out_proj_weight, Tensor? out_proj_bias, int num_heads, "
      "Tensor index, Tensor count, Tensor weight, "
      "Tensor? key_padding_mask=None, Tensor? attn_mask=None, bool is_causal=False, "
      "float dropout_p=0.0, Tensor? dropout_seed=None, float? scale=None) -> Tensor");

  // The general form. query [B, L, D], key [B, S, Dk], value [B, S, Dv]; q_weight [E, D],
  // k_weight [E, Dk], v_weight [E, Dv]; biases [E]; bias_k, bias_v [E]: one more key/value row;
  // add_zero_attn: one more row of zeros (after bias_k/bias_v). key_padding_mask [B, S] and
  // attn_mask broadcastable to [B, H, L, S] cover the S given keys; the added rows are always
  // visible.
  m.def(
      "selected_multihead_attention(Tensor query, Tensor key, Tensor value, "
      "Tensor q_weight, Tensor k_weight, Tensor v_weight, "
      "Tensor? q_bias, Tensor? k_bias, Tensor? v_bias, "
      "Tensor out_proj_weight, Tensor? out_proj_bias, int num_heads, "
      "Tensor index, Tensor count, Tensor weight, "
      "Tensor? bias_k=None, Tensor? bias_v=None, bool add_zero_attn=False, "
      "Tensor? key_padding_mask=None, Tensor? attn_mask=None, bool is_causal=False, "
      "float dropout_p=0.0, Tensor? dropout_seed=None, float? scale=None) -> Tensor");

  // The same with heads chosen by every token: chosen bool [B, L, H], weight [B, L, H]. The route
  // through LibTorch, which a device without a kernel takes, computes all of them and masks.
  for (const std::string form : {"routed", "_aten_routed"})
    def(form +
        "_multihead_attention(Tensor query, Tensor key, Tensor value, "
        "Tensor q_weight, Tensor k_weight, Tensor v_weight, "
        "Tensor? q_bias, Tensor? k_bias, Tensor? v_bias, "
        "Tensor out_proj_weight, Tensor? out_proj_bias, int num_heads, "
        "Tensor chosen, Tensor weight, "
        "Tensor? bias_k=None, Tensor? bias_v=None, bool add_zero_attn=False, "
        "Tensor? key_padding_mask=None, Tensor? attn_mask=None, bool is_causal=False, "
        "float dropout_p=0.0, Tensor? dropout_seed=None, float? scale=None) -> Tensor");

  // The core, for models that project, rotate or cache for themselves. q [B, H, L, d],
  // k [B, Hkv, S, d], v [B, Hkv, S, dv], Hkv divides H -> [B, H, L, dv], zeros where not chosen;
  // weight (optional) multiplies each head's output.
  m.def(
      "selected_attention(Tensor q, Tensor k, Tensor v, Tensor index, Tensor count, "
      "Tensor? weight=None, Tensor? key_padding_mask=None, Tensor? attn_mask=None, "
      "bool is_causal=False, float dropout_p=0.0, Tensor? dropout_seed=None, "
      "float? scale=None) -> Tensor");

  // The projections around the core, of the chosen heads only. x [B, L, D], weight [H d, D], bias
  // [H d] -> [B, H, L, d], zeros where not chosen.
  for (const std::string name : {"selected", "_aten"}) {
    def(name +
        "_projection(Tensor x, Tensor weight, Tensor? bias, int num_heads, "
        "Tensor index, Tensor count) -> Tensor");
    // heads [B, H, L, d] by any strides, weight [Dout, H d], bias [Dout], head_weight [B, H] ->
    // [B, L, Dout]; heads that were not chosen are not read.
    def(name +
        "_output_projection(Tensor heads, Tensor weight, Tensor? bias, "
        "Tensor index, Tensor count, Tensor? head_weight=None) -> Tensor");
  }
  // The key/value heads that the chosen query heads read: of H = num_heads, H / num_groups share
  // one. index, count -> index int32 [B, num_groups], count int32 [B]
  m.def(
      "select_groups(Tensor index, Tensor count, int num_heads, int num_groups) "
      "-> (Tensor index, Tensor count)");

  // Mean over query rows of (entropy of the row / ln(number of keys it can see)), in [0, 1], and of
  // the row's largest probability; padded queries are left out (query_padding_mask bool [B, L],
  // True = padding). q [B, H, L, d], k [B, Hkv, S, d] -> float32 or float64 [B, H] each.
  // O(L) memory a head: the L x S map is never materialised.
  m.def(
      "attention_statistics(Tensor q, Tensor k, Tensor? key_padding_mask=None, "
      "Tensor? query_padding_mask=None, Tensor? attn_mask=None, bool is_causal=False, "
      "float? scale=None) -> (Tensor entropy, Tensor confidence)");
  m.def(
      "attention_entropy(Tensor q, Tensor k, Tensor? key_padding_mask=None, "
      "Tensor? query_padding_mask=None, Tensor? attn_mask=None, bool is_causal=False, "
      "float? scale=None) -> Tensor");

  // Every head, in plain ATen calls (src/dense_attention.cpp). added_keys: how many of the last
  // keys bias_k/bias_v and add_zero_attn added; masks do not cover them.
  m.def(
      "project_heads(Tensor query, Tensor key, Tensor value, "
      "Tensor q_weight, Tensor k_weight, Tensor v_weight, "
      "Tensor? q_bias, Tensor? k_bias, Tensor? v_bias, int num_heads, "
      "Tensor? bias_k=None, Tensor? bias_v=None, bool add_zero_attn=False) "
      "-> (Tensor q, Tensor k, Tensor v)");
  m.def(
      "dense_attention(Tensor q, Tensor k, Tensor v, Tensor? key_padding_mask=None, "
      "Tensor? attn_mask=None, bool is_causal=False, float dropout_p=0.0, float? scale=None, "
      "int added_keys=0) -> Tensor");
  m.def(
      "attention_probabilities(Tensor q, Tensor k, Tensor? key_padding_mask=None, "
      "Tensor? attn_mask=None, bool is_causal=False, float? scale=None, int added_keys=0) "
      "-> Tensor");
  m.def(
      "combine_heads(Tensor context, Tensor? weight, Tensor out_proj_weight, "
      "Tensor? out_proj_bias) -> Tensor");

  // What the operators selected_* consist of: each backend registers those of the route
  // "_selected", and the route through LibTorch itself has separate names (src/ops/aten). `forward`
  // also returns what backward needs (K columns of `index`, kv rows = S + added rows; only chosen
  // slots are written): q [B, K, L, d], k and v [B, K, S + added, d], context [B, K, L, d] before
  // the weight, lse [B, K, L] = log of the softmax denominator (+inf where a row sees no key), in
  // float64 for float64 and float32 otherwise. A backend may lay rows out in these buffers as it
  // likes. `needs` selects the gradients to compute, in the order of the results; the others come
  // back with no elements. grad_attn_mask has the shape of attn_mask.
  const std::string masks =
      "Tensor? key_padding_mask, Tensor? attn_mask, bool is_causal, float dropout_p, "
      "Tensor? dropout_seed, float? scale";
  const std::string self =
      "Tensor x, Tensor in_proj_weight, Tensor? in_proj_bias, Tensor out_proj_weight, "
      "Tensor? out_proj_bias, int num_heads, Tensor index, Tensor count, Tensor weight, " +
      masks;
  const std::string multihead =
      "Tensor query, Tensor key, Tensor value, Tensor q_weight, Tensor k_weight, Tensor v_weight, "
      "Tensor? q_bias, Tensor? k_bias, Tensor? v_bias, Tensor out_proj_weight, "
      "Tensor? out_proj_bias, int num_heads, Tensor index, Tensor count, Tensor weight, "
      "Tensor? bias_k, Tensor? bias_v, bool add_zero_attn, " +
      masks;
  const std::string core =
      "Tensor q, Tensor k, Tensor v, Tensor index, Tensor count, Tensor? weight, " + masks;
  const std::string saved = "Tensor q, Tensor k, Tensor v, Tensor context, Tensor lse, ";
  for (const std::string route : {"_selected", "_aten"}) {
    def(route + "_self_attention_forward(" + self +
        ") -> (Tensor output, Tensor q, Tensor k, Tensor v, Tensor context, Tensor lse)");
    def(route + "_self_attention_backward(Tensor grad_output, " + self + ", " + saved +
        "bool[7] needs) -> (Tensor grad_x, Tensor grad_in_proj_weight, Tensor grad_in_proj_bias, "
        "Tensor grad_out_proj_weight, Tensor grad_out_proj_bias, Tensor grad_weight, "
        "Tensor grad_attn_mask)");
    def(route + "_multihead_attention_forward(" + multihead +
        ") -> (Tensor output, Tensor q, Tensor k, Tensor v, Tensor context, Tensor lse)");
    def(route + "_multihead_attention_backward(Tensor grad_output, " + multihead + ", " + saved +
        "bool[15] needs) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, "
        "Tensor grad_q_weight, Tensor grad_k_weight, Tensor grad_v_weight, "
        "Tensor grad_q_bias, Tensor grad_k_bias, Tensor grad_v_bias, "
        "Tensor grad_out_proj_weight, Tensor grad_out_proj_bias, Tensor grad_weight, "
        "Tensor grad_bias_k, Tensor grad_bias_v, Tensor grad_attn_mask)");
    // context [B, H, L, dv] before the weight if there is one, else no elements; lse [B, H, L].
    def(route + "_attention_forward(" + core + ") -> (Tensor output, Tensor context, Tensor lse)");
    def(route + "_attention_backward(Tensor grad_output, " + core +
        ", "
        "Tensor output, Tensor context, Tensor lse, bool[5] needs) -> "
        "(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_weight, Tensor grad_attn_mask)");
    def(route +
        "_projection_backward(Tensor grad_output, Tensor x, Tensor weight, int num_heads, "
        "Tensor index, Tensor count, bool[3] needs) -> "
        "(Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
    def(route +
        "_output_projection_backward(Tensor grad_output, Tensor heads, Tensor weight, "
        "Tensor index, Tensor count, Tensor? head_weight, bool[4] needs) -> "
        "(Tensor grad_heads, Tensor grad_weight, Tensor grad_bias, Tensor grad_head_weight)");
  }
  // Of routed_multihead_attention, on a CPU: q and context [B, H, L, d], k and v
  // [B, H, S + added, d], lse [B, H, L], all in lse's type; laid out as the kernel likes.
  const std::string routed =
      "Tensor query, Tensor key, Tensor value, Tensor q_weight, Tensor k_weight, Tensor v_weight, "
      "Tensor? q_bias, Tensor? k_bias, Tensor? v_bias, Tensor out_proj_weight, "
      "Tensor? out_proj_bias, int num_heads, Tensor chosen, Tensor weight, "
      "Tensor? bias_k, Tensor? bias_v, bool add_zero_attn, " +
      masks;
  def("_routed_multihead_attention_forward" + ("(" + routed) +
      ") -> (Tensor output, Tensor q, Tensor k, Tensor v, Tensor context, Tensor lse)");
  def("_routed_multihead_attention_backward" + ("(Tensor grad_output, " + routed) + ", " + saved +
      "bool[15] needs) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, "
      "Tensor grad_q_weight, Tensor grad_k_weight, Tensor grad_v_weight, "
      "Tensor grad_q_bias, Tensor grad_k_bias, Tensor grad_v_bias, "
      "Tensor grad_out_proj_weight, Tensor grad_out_proj_bias, Tensor grad_weight, "
      "Tensor grad_bias_k, Tensor grad_bias_v, Tensor grad_attn_mask)");
  // What every layer does first on a CUDA device, by itself, for benchmarks: the lists of active
  // pairs (src/kernels/cuda/work_list.cu) as one int32 tensor.
  m.def("_work_list(Tensor index, Tensor count, int num_heads) -> Tensor");

  // Gates (src/gates). masked_mean: x [B, L, D], mask bool or floating [B, L] -> [B, D].
  m.def("masked_mean(Tensor x, Tensor? key_padding_mask=None) -> Tensor");
  // budget [B] in (0, 1] -> int32 [B]; rounding 'round' (half up) or 'ceil'
  m.def("budget_count(Tensor budget, int num_heads, int min_heads, str rounding) -> Tensor");
  // weight [B, H] -> the heads whose weight is not 0
  m.def("select_nonzero(Tensor weight) -> (Tensor index, Tensor count)");
  m.def("soft_top_k(Tensor scores, Tensor mass, Tensor temperature) -> Tensor");
  m.def("gate_features(Tensor x, Tensor? key_padding_mask=None) -> Tensor");
  m.def("feature_moments(Tensor features) -> Tensor");
  m.def(
      "update_statistics(Tensor moments, Tensor(a!) mean, Tensor(b!) variance, Tensor(c!) batches) "
      "-> ()");
  m.def("standardize(Tensor features, Tensor mean, Tensor variance) -> Tensor");
  // x [B, L, D], mean and variance [D], batches [] -> the four above in one: [B, D]
  m.def(
      "learn_features(Tensor x, Tensor? key_padding_mask, Tensor(a!) mean, Tensor(b!) variance, "
      "Tensor(c!) batches) -> Tensor");
  m.def(
      "gate_starts(Tensor[] importance, str[] layers, int[] num_heads, float keep, "
      "float sharpness) -> (Tensor[] relevance, float[] shares)");
  m.def("importance_start(Tensor importance, float keep, float sharpness) -> Tensor");
  // Those with an underscore are the steps on a CPU, with what their derivatives read besides: the
  // scale [] of the product; hidden [B, h] before its activation; slope [B, H] of weight by scores;
  // share [B], see soft_top_k in src/kernels/gate_choice.h; the slope of `expected`.
  const std::string relevance =
      "(Tensor features, Tensor base, Tensor weight, Tensor progress, bool training, "
      "float static_until) -> ";
  def("input_relevance" + relevance + "Tensor");
  def("_input_relevance" + relevance + "(Tensor relevance, Tensor scale)");
  const std::string head_budget =
      "(Tensor features, Tensor hidden_weight, Tensor hidden_bias, Tensor out_weight, "
      "Tensor out_bias, Tensor progress, bool training, float min_budget, float max_budget, "
      "float keep, float initial_keep, float warmup, float static_until) -> ";
  def("head_budget" + head_budget + "(Tensor budget, Tensor asked)");
  def("_head_budget" + head_budget + "(Tensor budget, Tensor asked, Tensor hidden, Tensor scale)");
  m.def(
      "_head_budget_backward(Tensor? grad_budget, Tensor? grad_asked, Tensor features, "
      "Tensor out_weight, Tensor asked, Tensor hidden, Tensor scale, float min_budget, "
      "float max_budget) -> (Tensor grad_hidden_weight, Tensor grad_hidden_bias, "
      "Tensor grad_out_weight, Tensor grad_out_bias)");
  const std::string chosen = "Tensor index, Tensor count, Tensor weight, Tensor expected_heads";
  const std::string budget_select =
      "(Tensor relevance, Tensor budget, Tensor progress, Tensor? noise, "
      "bool training, bool run_all, float temperature, float final_temperature, "
      "float noise_scale, float hard_from, bool straight_through, bool soft_weight, "
      "int min_heads, str rounding) -> (" +
      chosen;
  def("budget_select" + budget_select + ")");
  def("_budget_select" + budget_select + ", Tensor slope, Tensor share)");
  m.def(
      "_choice_backward(Tensor? grad_weight, Tensor? grad_expected, Tensor slope, "
      "Tensor? expected_slope, Tensor? share) -> (Tensor grad_scores, Tensor grad_budget)");
  m.def("static_relevance(Tensor base, Tensor x) -> Tensor");
  m.def("gumbel_noise(Tensor uniform) -> Tensor");
  m.def("relevance_entropy(Tensor relevance) -> Tensor");
  m.def("budget_bounds(Tensor asked, float min_budget, float max_budget) -> Tensor");
  m.def(
      "hard_concrete(Tensor log_alpha, Tensor? uniform=None, float beta=0.33, float gamma=-0.1, "
      "float zeta=1.1) -> Tensor");
  m.def(
      "hard_concrete_open(Tensor log_alpha, float beta=0.33, float gamma=-0.1, float zeta=1.1) "
      "-> Tensor");
  const std::string hard_concrete_select =
      "(Tensor log_alpha, Tensor? uniform, Tensor progress, bool training, "
      "bool run_all, float hard_from, float beta, float gamma, float zeta, bool weight_one) -> (" +
      chosen;
  def("hard_concrete_select" + hard_concrete_select + ")");
  def("_hard_concrete_select" + hard_concrete_select + ", Tensor slope, Tensor expected_slope)");
  m.def(
      "target_penalty(Tensor[] expected_heads, int[] num_heads, Tensor progress, float keep, "
      "float initial_keep, float warmup, float strength, str form, Tensor? multipliers=None) "
      "-> Tensor");
  // x [B, L, D], mean and variance [D], base [H], relevance_weight [H, D], hidden_weight [h, D],
  // hidden_bias [h], out_weight [1, h], out_bias [1] -> index, count, weight, relevance [B, H] and
  // budget [B] of a BudgetGate in evaluation with weights of one. Without the four of the network
  // every sequence has `budget`. `_budget_gate` is the kernel that runs where no gradient is
  // wanted.
  const std::string budget_gate =
      "(Tensor x, Tensor? key_padding_mask, Tensor mean, Tensor variance, Tensor base, "
      "Tensor relevance_weight, Tensor? hidden_weight, Tensor? hidden_bias, Tensor? out_weight, "
      "Tensor? out_bias, Tensor progress, float budget, float min_budget, float max_budget, "
      "float keep, float initial_keep, float warmup, int min_heads, str rounding) -> "
      "(Tensor index, Tensor count, Tensor weight, Tensor relevance, Tensor budget)";
  def("evaluate_budget_gate" + budget_gate);
  def("_budget_gate" + budget_gate);
  m.def(
      "evaluate_relevance(Tensor x, Tensor? key_padding_mask, Tensor mean, Tensor variance, "
      "Tensor base, Tensor weight, Tensor progress) -> Tensor");
  m.def("routed_first(Tensor shared, int num_heads) -> Tensor");
  // router [.., R], shared_router [.., s] (s > 1), kind_router [.., 2] (R > 0 and s > 0), shared
  // int [s], H = R + s -> chosen bool [.., H], weight and relevance [.., H]
  m.def(
      "route_heads(Tensor router, Tensor? shared_router, Tensor? kind_router, Tensor shared, "
      "int routed, Tensor? padding=None) -> (Tensor chosen, Tensor weight, Tensor relevance)");
  m.def(
      "routing_balance(Tensor relevance, Tensor chosen, Tensor shared, Tensor? padding=None) "
      "-> Tensor");
  m.def(
      "share_heads(Tensor index, Tensor count, Tensor weight, Tensor relevance, Tensor shared) "
      "-> (Tensor index, Tensor count, Tensor weight, Tensor relevance)");
  // From a selection among G groups to the heads in them: place int64 [H], the group of each head.
  m.def(
      "choose_group_heads(Tensor index, Tensor count, Tensor weight, Tensor place) "
      "-> (Tensor index, Tensor count, Tensor weight)");
  m.def("awake_heads(Tensor score, Tensor awake, int count, float margin) -> Tensor");
  m.def("update_head_score(Tensor score, Tensor gradient, float decay, bool first) -> Tensor");
  m.def("subset_sample(Tensor scores, int k, Tensor temperature) -> Tensor");
  m.def(
      "subset_weight(Tensor scores, Tensor? noise, Tensor progress, int k, bool training, "
      "float temperature, float final_temperature, float cooled_at, float hard_from) -> Tensor");
  m.def(
      "integer_importance(Tensor q, Tensor k, Tensor? key_padding_mask=None, "
      "Tensor? query_padding_mask=None, Tensor? attn_mask=None, bool is_causal=False, "
      "float resolution=1.0, int block=2, bool normalize=True, int added_keys=0) "
      "-> (Tensor blocks, Tensor visible, Tensor head)");
  m.def("kept_blocks(Tensor blocks, Tensor visible, float ratio) -> Tensor");
  m.def("three_product_scores(Tensor q, Tensor k, float resolution=1.0) -> Tensor");
  m.def(
      "hybrid_attention(Tensor q, Tensor k, Tensor v, Tensor? key_padding_mask=None, "
      "Tensor? query_padding_mask=None, Tensor? attn_mask=None, bool is_causal=False, "
      "float resolution=1.0, int block=2, float? block_ratio=None, bool approximate=False, "
      "int added_keys=0) -> Tensor");
  m.def(
      "select_above(Tensor importance, Tensor threshold, int min_heads) "
      "-> (Tensor index, Tensor count)");
  m.def(
      "allocate_budget(Tensor scores, Tensor tilts, Tensor budget, Tensor progress, bool training, "
      "float temperature, float final_temperature, float hard_from) -> Tensor");
  m.def(
      "gates_penalty(Tensor[] expected_heads, int[] num_heads, str[] types, bool[] pooled, "
      "Tensor[] progress, float[] keep, float[] initial_keep, float[] warmup, float[] strength, "
      "str[] forms, Tensor?[] multipliers, Tensor?[] regularisers, Tensor[] others) -> Tensor");
  const std::string gumbel_sigmoid_select =
      "(Tensor logits, Tensor? uniform, Tensor progress, bool training, "
      "bool run_all, float hard_from, float temperature) -> (" +
      chosen;
  def("gumbel_sigmoid_select" + gumbel_sigmoid_select + ")");
  def("_gumbel_sigmoid_select" + gumbel_sigmoid_select + ", Tensor slope)");
  m.def(
      "gumbel_sigmoid_regulariser(Tensor logits, Tensor weight, Tensor progress, float keep, "
      "float initial_keep, float warmup, float strength) -> Tensor");

  // What decoders do around the operators (src/decoding.h). heads [B, H, L, d], cos and sin
  // [B or 1, L, r]; slots int64 [B, K], the groups that a cache holds of each sequence, then -1.
  m.def("rotate_heads(Tensor heads, Tensor cos, Tensor sin, bool neighbours=False) -> Tensor");
  m.def("causal_mask(Tensor q, Tensor k, Tensor? attn_mask, SymInt? window) -> Tensor");
  m.def("hide_tokens(Tensor x, Tensor? padding, Tensor? seen, int? first) -> Tensor");
  m.def("slots_of(Tensor index, Tensor count) -> Tensor?");
  m.def("take_slots(Tensor groups, Tensor slots) -> Tensor");
  m.def("spread_slots(Tensor held, Tensor slots, int num_groups) -> Tensor");

  // Structured pruning (src/structure, src/cofi.cpp).
  m.def(
      "masked_layer_norm(Tensor x, Tensor mask, Tensor? weight=None, Tensor? bias=None, "
      "float eps=1e-5, bool scaled=True) -> Tensor");
  m.def(
      "structure_size(Tensor[] heads, Tensor attention, Tensor[] neurons, Tensor ffn, "
      "Tensor hidden, int[] head_dims) -> Tensor");
  m.def(
      "sparsity_penalty(Tensor size, float full_size, Tensor progress, float target, "
      "float warmup, Tensor multipliers) -> Tensor");
  m.def(
      "hard_concrete_keep(Tensor log_alpha, float beta=0.6666666666666666, float gamma=-0.1, "
      "float zeta=1.1, float shift=0.0) -> Tensor");
  m.def("match_layers(Tensor distances, Tensor alive) -> Tensor");
  m.def("distillation_loss(Tensor student, Tensor teacher, float temperature=2.0) -> Tensor");

  // Explanations (src/explain).
  m.def(
      "attention_peaks(Tensor q, Tensor k, Tensor? key_padding_mask=None, "
      "Tensor? attn_mask=None, bool is_causal=False, Tensor? excluded=None, float? scale=None) "
      "-> (Tensor key, Tensor weight)");
  m.def(
      "peak_hits(Tensor key, Tensor trials, Tensor group, int questions, bool others_only=False) "
      "-> (Tensor hits, Tensor trials)");
  m.def(
      "share_interval(Tensor hits, Tensor trials, int resamples=1000, int seed=0, "
      "float confidence_level=0.95) -> (Tensor share, Tensor low, Tensor high)");
  m.def(
      "selection_information(Tensor chosen, Tensor label, int classes, int permutations=1000, "
      "int seed=0) -> (Tensor information, Tensor by_chance, Tensor p)");
  m.def(
      "selection_association(Tensor chosen, Tensor value, int permutations=1000, int seed=0) "
      "-> (Tensor correlation, Tensor p)");
  m.def("false_discovery_rate(Tensor p) -> Tensor");
  m.def("co_selection(Tensor chosen) -> Tensor");
  m.def("selection_overlap(Tensor first, Tensor second) -> Tensor");
  m.def("area_between(Tensor x, Tensor first, Tensor other) -> Tensor");
  m.def(
      "token_shares(Tensor x, Tensor? key_padding_mask, Tensor base, Tensor weight, "
      "Tensor mean, Tensor variance) -> (Tensor shares, Tensor constant)");
  m.def(
      "budget_attribution(Tensor x, Tensor? key_padding_mask, Tensor mean, Tensor variance, "
      "Tensor hidden_weight, Tensor hidden_bias, Tensor out_weight, Tensor out_bias, "
      "Tensor progress, float keep, float initial_keep, float warmup, int steps=32) "
      "-> (Tensor attribution, Tensor baseline, Tensor value)");
  m.def("relevance_rank(Tensor relevance) -> Tensor");
  m.def("selection_margin(Tensor relevance, Tensor chosen) -> Tensor");
  m.def("budget_needed(Tensor rank, int min_heads, str rounding) -> Tensor");

  // Analyses (src/analysis, src/statistics).
  m.def("held_slope(Tensor x, Tensor value) -> Tensor");
  m.def("held_layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor");
  // [B, H, L, d] x 2 -> float64 [B, H]
  m.def("relevance_shares(Tensor context, Tensor gradient) -> Tensor");
  m.def("causal_penalty(Tensor logits, float strength, float limit) -> Tensor");
  // [T] x 2 -> facilitating, interfering, irrelevant: [T] each
  m.def("causal_roles(Tensor raised, Tensor lowered) -> (Tensor, Tensor, Tensor)");
  // [B, H], [B], [B, H] -> index [B, H], count [B], weight [B, H]
  m.def(
      "widen_selection(Tensor weight, Tensor count, Tensor relevance, float factor) "
      "-> (Tensor, Tensor, Tensor)");
  // [S, N] -> int64 [N]
  m.def("stopping_stage(Tensor confidence, float threshold) -> Tensor");
  // [B, C] -> [B]
  m.def("prediction_confidence(Tensor logits, str measure='probability') -> Tensor");
  // [S - 1, N], [S, N] -> the threshold
  m.def("confidence_threshold(Tensor confidence, Tensor cost, float limit) -> float");
  m.def(
      "accurate_threshold(Tensor confidence, Tensor correct, float loss, float? certainty=None) "
      "-> float");
  m.def("binomial_tail(int successes, int trials, float probability) -> float");
  // differences [M, N] -> mean, low, high, p: [M] each
  m.def(
      "paired_bootstrap(Tensor differences, int resamples=1000, int seed=0, "
      "float confidence_level=0.95) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("linear_cka(Tensor[] outputs) -> Tensor");  // T x [n, d] -> [T, T]
  // [N], [P, N] x 3 -> effect [P], standard error [P]
  m.def(
      "second_order_effect(Tensor full, Tensor first, Tensor second, Tensor both) "
      "-> (Tensor, Tensor)");
  // scores [S, N] -> value, low, high: [S, S] each
  m.def(
      "rank_agreement(Tensor scores, str method='spearman', int resamples=1000, int seed=0, "
      "float confidence_level=0.95) -> (Tensor, Tensor, Tensor)");
}
