// Graphs: nodes, conditional nodes with their bodies, instantiation, launch.
#include "emulator.h"

#include <algorithm>
#include <cstring>

namespace emulator {
namespace {

Graph* find_graph(CUgraph handle) {
  auto found = state().graphs.find(handle);
  return found == state().graphs.end() ? nullptr : found->second;
}

Node* find_node(CUgraphNode handle) {
  auto found = state().nodes.find(handle);
  return found == state().nodes.end() ? nullptr : found->second;
}

bool is_inside(const Graph& graph, const Graph& outer) {
  for (const Graph* g = &graph; g; g = g->parent ? g->parent->graph : nullptr) {
    if (g == &outer) return true;
  }
  return false;
}

bool contains(const Graph& graph, const std::vector<CUgraphNodeType>& types) {
  return std::any_of(graph.nodes.begin(), graph.nodes.end(), [&](const auto& node) {
    bool is_one = std::find(types.begin(), types.end(), node->work.type) != types.end();
    return is_one || (node->child && contains(*node->child, types));
  });
}

void copy_nodes(const Graph& from, Graph& to) {
  std::unordered_map<CUgraphNode, CUgraphNode> copies;
  for (const auto& node : from.nodes) {
    std::vector<CUgraphNode> dependencies;
    for (CUgraphNode one : node->dependencies) dependencies.push_back(copies.at(one));
    Node* copy = add_node(to, node->work, node->context, std::move(dependencies));
    copies[node->handle] = copy->handle;
    if (!node->child) continue;
    copy->child.reset(new_graph(copy));
    copy_nodes(*node->child, *copy->child);
  }
}

bool is_zero(const void* begin, const void* end) {
  const auto* first = static_cast<const unsigned char*>(begin);
  return std::all_of(first, static_cast<const unsigned char*>(end), [](auto b) { return b == 0; });
}

// "All unused bytes must be set to zero": what lies before and behind the union's member in use.
template <class Member>
bool is_rest_zero(const CUgraphNodeParams& params, const Member& member) {
  return is_zero(&params.reserved0, &params.reserved0[3]) && is_zero(&member + 1, &params + 1);
}

// Why a condition can not be that of a new node in `graph`.
CUresult check_condition(const Graph& graph, const CUDA_CONDITIONAL_NODE_PARAMS& params) {
  const int version = state().settings.version;
  auto found = state().conditions.find(params.handle);
  ConditionPtr condition = found == state().conditions.end() ? nullptr : found->second.lock();
  if (!condition || condition->has_node) return CUDA_ERROR_INVALID_VALUE;
  if (!is_inside(graph, *condition->graph)) return CUDA_ERROR_INVALID_VALUE;
  if (params.ctx != condition->context->handle) return CUDA_ERROR_INVALID_CONTEXT;
  unsigned most = version < 12080 ? 1 : 2;
  switch (params.type) {
    case CU_GRAPH_COND_TYPE_WHILE: most = 1; break;
    case CU_GRAPH_COND_TYPE_IF: break;
    case CU_GRAPH_COND_TYPE_SWITCH: most = version < 12080 ? 0 : 1024; break;
    default: return CUDA_ERROR_INVALID_VALUE;
  }
  return params.size >= 1 && params.size <= most ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult add_conditional(Graph& graph, std::vector<CUgraphNode> dependencies,
                         CUgraphNodeParams& params, Node*& added) {
  CUDA_CONDITIONAL_NODE_PARAMS& wanted = params.conditional;
  if (state().settings.version < 12040) return CUDA_ERROR_NOT_SUPPORTED;
  if (!is_rest_zero(params, wanted)) return CUDA_ERROR_INVALID_VALUE;
  if (CUresult wrong = check_condition(graph, wanted)) return wrong;
  ConditionPtr condition = state().conditions[wanted.handle].lock();
  added = add_node(graph, Work{CU_GRAPH_NODE_TYPE_CONDITIONAL, nullptr}, condition->context,
                   std::move(dependencies));
  condition->has_node = true;
  added->condition = condition;
  added->condition_type = wanted.type;
  for (unsigned k = 0; k < wanted.size; ++k) {
    added->bodies.emplace_back(new_graph(added));
    added->body_handles.push_back(added->bodies.back()->handle);
  }
  wanted.phGraph_out = added->body_handles.data();
  return CUDA_SUCCESS;
}

CUresult add_child(Graph& graph, std::vector<CUgraphNode> dependencies, CUgraph handle,
                   Node*& added) {
  Graph* child = find_graph(handle);
  if (!child || child->num_captures || is_inside(graph, *child)) return CUDA_ERROR_INVALID_VALUE;
  if (contains(*child, {CU_GRAPH_NODE_TYPE_CONDITIONAL, CU_GRAPH_NODE_TYPE_MEM_ALLOC,
                        CU_GRAPH_NODE_TYPE_MEM_FREE})) {
    return CUDA_ERROR_NOT_SUPPORTED;
  }
  added = add_node(graph, Work{CU_GRAPH_NODE_TYPE_GRAPH, nullptr}, current_context(),
                   std::move(dependencies));
  added->child.reset(new_graph(added));
  copy_nodes(*child, *added->child);
  return CUDA_SUCCESS;
}

CUresult add_any(CUgraphNode* node, CUgraph handle, const CUgraphNode* dependencies,
                 std::size_t count, CUgraphNodeParams* params) {
  Graph* graph = find_graph(handle);
  // An address this low is a number: the arguments of the other version of this call.
  bool has_params = reinterpret_cast<std::uintptr_t>(params) > 4096;
  if (!node || !graph || !has_params || count > graph->nodes.size() || (count && !dependencies)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  std::set<CUgraphNode> distinct(dependencies, dependencies + count);
  bool are_its_own = std::all_of(distinct.begin(), distinct.end(), [&](CUgraphNode one) {
    return find_node(one) && find_node(one)->graph == graph;
  });
  if (distinct.size() != count || !are_its_own) return CUDA_ERROR_INVALID_VALUE;

  std::vector<CUgraphNode> before(dependencies, dependencies + count);
  Node* added = nullptr;
  CUresult result = CUDA_SUCCESS;
  if (params->type == CU_GRAPH_NODE_TYPE_CONDITIONAL) {
    result = add_conditional(*graph, std::move(before), *params, added);
  } else if (params->type == CU_GRAPH_NODE_TYPE_GRAPH) {
    bool is_clean = is_rest_zero(*params, params->graph);
    if (!is_clean) return CUDA_ERROR_INVALID_VALUE;
    result = add_child(*graph, std::move(before), params->graph.graph, added);
  } else if (params->type == CU_GRAPH_NODE_TYPE_EMPTY) {
    added = add_node(*graph, Work{CU_GRAPH_NODE_TYPE_EMPTY, nullptr}, current_context(), before);
  } else {
    return CUDA_ERROR_NOT_SUPPORTED;  // the callers capture all else
  }
  if (result == CUDA_SUCCESS) *node = added->handle;
  return result;
}

// Why a node may not be in the body of a conditional node.
const char* body_fault(const Node& node, const Context& context) {
  switch (node.work.type) {
    case CU_GRAPH_NODE_TYPE_KERNEL:
      return node.context == &context ? nullptr : "a kernel of another context";
    case CU_GRAPH_NODE_TYPE_MEMCPY:
      return node.work.touches_pageable ? "a copy from or to pageable memory" : nullptr;
    case CU_GRAPH_NODE_TYPE_MEMSET:
    case CU_GRAPH_NODE_TYPE_EMPTY:
    case CU_GRAPH_NODE_TYPE_GRAPH:
    case CU_GRAPH_NODE_TYPE_CONDITIONAL: return nullptr;
    default: return "a node of a type that is not allowed there";
  }
}

// One order of execution. Of two nodes that do not depend on each other the one recorded later
// runs first: a dependency that the caller forgot shows.
std::vector<Node*> in_order(const Graph& graph) {
  std::vector<Node*> open, order;
  for (const auto& node : graph.nodes) open.push_back(node.get());
  std::set<CUgraphNode> done;
  while (!open.empty()) {
    auto ready = std::find_if(open.rbegin(), open.rend(), [&](const Node* node) {
      const auto& before = node->dependencies;
      return std::all_of(before.begin(), before.end(), [&](auto one) { return done.count(one); });
    });
    done.insert((*ready)->handle);
    order.push_back(*ready);
    open.erase(std::next(ready).base());
  }
  return order;
}

CUresult plan_graph(const Graph& graph, const Context* body_of, GraphExec& exec,
                    std::shared_ptr<Plan>& plan) {
  if (graph.num_captures) return CUDA_ERROR_ILLEGAL_STATE;
  plan = std::make_shared<Plan>();
  for (const Node* node : in_order(graph)) {
    const char* fault = body_of ? body_fault(*node, *body_of) : nullptr;
    if (fault) {
      report("instantiate: the body of a conditional node holds %s", fault);
      return CUDA_ERROR_INVALID_VALUE;
    }
    Plan::Step step{node->work, node->condition, node->condition_type, {}};
    std::vector<const Graph*> inner;
    if (node->child) inner.push_back(node->child.get());
    for (const auto& body : node->bodies) inner.push_back(body.get());
    for (const Graph* one : inner) {
      const Context* context = node->condition ? node->context : body_of;
      step.graphs.emplace_back();
      if (CUresult wrong = plan_graph(*one, context, exec, step.graphs.back())) return wrong;
    }
    plan->steps.push_back(std::move(step));
  }
  for (const ConditionPtr& condition : graph.conditions) {
    if (!condition->has_node) return CUDA_ERROR_INVALID_VALUE;
    exec.conditions.push_back(condition);
  }
  return CUDA_SUCCESS;
}

CUresult instantiate(const Call& call, CUgraphExec* exec, CUgraph handle) {
  Graph* graph = find_graph(handle);
  if (!exec || !graph || graph->parent) return CUDA_ERROR_INVALID_VALUE;
  auto created = std::make_shared<GraphExec>();
  if (CUresult wrong = plan_graph(*graph, nullptr, *created, created->plan)) return wrong;
  created->handle = *exec = state().execs.next();
  created->context = call.context;
  state().execs.add(created);
  return CUDA_SUCCESS;
}

unsigned value_of(const Condition& condition) {
  std::lock_guard<std::mutex> lock(state().mutex);
  return condition.value;
}

CUresult run_plan(const Plan& plan);

CUresult run_step(const Plan::Step& step) {
  if (!step.condition) return step.graphs.empty() ? CUDA_SUCCESS : run_plan(*step.graphs[0]);
  unsigned value = value_of(*step.condition);
  switch (step.condition_type) {
    case CU_GRAPH_COND_TYPE_WHILE:
      for (; value; value = value_of(*step.condition)) {
        if (CUresult failed = run_plan(*step.graphs[0])) return failed;
      }
      return CUDA_SUCCESS;
    case CU_GRAPH_COND_TYPE_IF: value = value ? 0 : 1; [[fallthrough]];
    default: return value < step.graphs.size() ? run_plan(*step.graphs[value]) : CUDA_SUCCESS;
  }
}

CUresult run_plan(const Plan& plan) {
  for (const Plan::Step& step : plan.steps) {
    CUresult failed = step.work.run ? step.work.run() : run_step(step);
    if (failed) return failed;
  }
  return CUDA_SUCCESS;
}

bool are_usable(const Plan& plan) {
  return std::all_of(plan.steps.begin(), plan.steps.end(), [](const Plan::Step& step) {
    return are_usable(step.work.uses) &&
           std::all_of(step.graphs.begin(), step.graphs.end(),
                       [](const auto& inner) { return are_usable(*inner); });
  });
}

// A launch: the conditions get their defaults, then the nodes run.
CUresult run_exec(const std::shared_ptr<Plan>& plan, const std::vector<ConditionPtr>& conditions) {
  auto count = [&](int change) {
    std::lock_guard<std::mutex> lock(state().mutex);
    for (const ConditionPtr& condition : conditions) {
      condition->num_running += change;
      if (change > 0 && condition->has_default) condition->value = condition->default_value;
    }
  };
  count(1);
  CUresult result = run_plan(*plan);
  count(-1);
  return result;
}

CUresult remove_graph(CUgraph handle) {
  Graph* graph = find_graph(handle);
  if (!graph || graph->parent || graph->num_captures) return CUDA_ERROR_INVALID_VALUE;
  forget_graph(*graph);
  return CUDA_SUCCESS;
}

}  // namespace

Graph* new_graph(Node* parent) {
  auto graph = std::make_unique<Graph>();
  graph->handle = reinterpret_cast<CUgraph>(next_handle());
  graph->parent = parent;
  state().graphs[graph->handle] = graph.get();
  if (parent) return graph.release();  // the node owns it
  return (state().owned_graphs[graph->handle] = std::move(graph)).get();
}

void forget_graph(Graph& graph) {
  for (const auto& node : graph.nodes) {
    state().nodes.erase(node->handle);
    if (node->child) forget_graph(*node->child);
    for (const auto& body : node->bodies) forget_graph(*body);
  }
  state().graphs.erase(graph.handle);
  if (!graph.parent) state().owned_graphs.erase(graph.handle);
}

Node* add_node(Graph& graph, Work work, Context* context, std::vector<CUgraphNode> dependencies) {
  auto node = std::make_unique<Node>(
      Node{reinterpret_cast<CUgraphNode>(next_handle()), &graph, std::move(work),
           context, std::move(dependencies)});
  state().nodes[node->handle] = node.get();
  graph.nodes.push_back(std::move(node));
  return graph.nodes.back().get();
}

}  // namespace emulator

using namespace emulator;

CUresult cuGraphCreate(CUgraph* graph, unsigned flags) {
  EMULATOR_CALL(cuGraphCreate, kInit);
  if (!graph || flags) return CUDA_ERROR_INVALID_VALUE;
  *graph = new_graph(nullptr)->handle;
  return CUDA_SUCCESS;
}

CUresult cuGraphDestroy(CUgraph graph) {
  EMULATOR_CALL(cuGraphDestroy, kInit);
  return remove_graph(graph);
}

CUresult cuGraphAddNode(CUgraphNode* node, CUgraph graph, const CUgraphNode* dependencies,
                        std::size_t count, CUgraphNodeParams* params) {
  EMULATOR_CALL(cuGraphAddNode, kInit);
  return add_any(node, graph, dependencies, count, params);
}

CUresult cuGraphAddNode_v2(CUgraphNode* node, CUgraph graph, const CUgraphNode* dependencies,
                           const CUgraphEdgeData* edges, std::size_t count,
                           CUgraphNodeParams* params) {
  EMULATOR_CALL(cuGraphAddNode_v2, kInit);
  if (edges) return CUDA_ERROR_NOT_SUPPORTED;  // no caller has edges that are not plain
  return add_any(node, graph, dependencies, count, params);
}

CUresult cuGraphAddChildGraphNode(CUgraphNode* node, CUgraph graph,
                                  const CUgraphNode* dependencies, std::size_t count,
                                  CUgraph child) {
  EMULATOR_CALL(cuGraphAddChildGraphNode, kInit);
  CUgraphNodeParams params{};
  params.type = CU_GRAPH_NODE_TYPE_GRAPH;
  params.graph.graph = child;
  return add_any(node, graph, dependencies, count, &params);
}

CUresult cuGraphAddEmptyNode(CUgraphNode* node, CUgraph graph, const CUgraphNode* dependencies,
                             std::size_t count) {
  EMULATOR_CALL(cuGraphAddEmptyNode, kInit);
  CUgraphNodeParams params{};
  params.type = CU_GRAPH_NODE_TYPE_EMPTY;
  return add_any(node, graph, dependencies, count, &params);
}

CUresult cuGraphGetNodes(CUgraph graph, CUgraphNode* nodes, std::size_t* count) {
  EMULATOR_CALL(cuGraphGetNodes, kInit);
  Graph* found = find_graph(graph);
  if (!found || !count) return CUDA_ERROR_INVALID_VALUE;
  std::size_t all = found->nodes.size();
  if (nodes) {
    for (std::size_t k = 0; k < *count; ++k) nodes[k] = k < all ? found->nodes[k]->handle : nullptr;
  }
  *count = nodes ? std::min(*count, all) : all;
  return CUDA_SUCCESS;
}

CUresult cuGraphNodeGetType(CUgraphNode node, CUgraphNodeType* type) {
  EMULATOR_CALL(cuGraphNodeGetType, kInit);
  Node* found = find_node(node);
  if (!found || !type) return CUDA_ERROR_INVALID_VALUE;
  *type = found->work.type;
  return CUDA_SUCCESS;
}

CUresult cuGraphChildGraphNodeGetGraph(CUgraphNode node, CUgraph* graph) {
  EMULATOR_CALL(cuGraphChildGraphNodeGetGraph, kInit);
  Node* found = find_node(node);
  if (!found || !graph || !found->child) return CUDA_ERROR_INVALID_VALUE;
  *graph = found->child->handle;
  return CUDA_SUCCESS;
}

CUresult cuGraphConditionalHandleCreate(CUgraphConditionalHandle* handle, CUgraph graph,
                                        CUcontext context, unsigned default_value,
                                        unsigned flags) {
  EMULATOR_CALL(cuGraphConditionalHandleCreate, kInit);
  if (state().settings.version < 12040) return CUDA_ERROR_NOT_SUPPORTED;
  Graph* found = find_graph(graph);
  if (!handle || !found || flags > CU_GRAPH_COND_ASSIGN_DEFAULT) return CUDA_ERROR_INVALID_VALUE;
  Context* owner = context ? state().contexts.find(context) : call.context;
  if (!owner || !owner->is_alive) return CUDA_ERROR_INVALID_CONTEXT;
  *handle = next_handle();
  auto condition = std::make_shared<Condition>(
      Condition{*handle, found, owner, default_value, flags == CU_GRAPH_COND_ASSIGN_DEFAULT});
  found->conditions.push_back(condition);
  state().conditions[*handle] = condition;
  return CUDA_SUCCESS;
}

CUresult cuGraphInstantiateWithFlags(CUgraphExec* exec, CUgraph graph, unsigned long long flags) {
  EMULATOR_CALL(cuGraphInstantiateWithFlags, kContext);
  return flags ? CUDA_ERROR_NOT_SUPPORTED : instantiate(call, exec, graph);
}

CUresult cuGraphUpload(CUgraphExec exec, CUstream stream) {
  EMULATOR_CALL(cuGraphUpload, kContext);
  if (!state().execs.find(exec)) return CUDA_ERROR_INVALID_VALUE;
  Stream* on = find_stream(call, stream);
  return on ? check_not_captured(*on) : CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuGraphLaunch(CUgraphExec exec, CUstream stream) {
  EMULATOR_CALL(cuGraphLaunch, kContext);
  GraphExec* found = state().execs.find(exec);
  Stream* on = find_stream(call, stream);
  if (!found) return CUDA_ERROR_INVALID_VALUE;
  if (!on) return CUDA_ERROR_INVALID_HANDLE;
  if (CUresult wrong = check_not_captured(*on)) return wrong;
  bool is_usable = are_usable(*found->plan);
  auto run = [plan = found->plan, conditions = found->conditions, is_usable] {
    return is_usable ? run_exec(plan, conditions) : CUDA_ERROR_ILLEGAL_ADDRESS;
  };
  // Launches of one executable graph follow each other, whatever their streams.
  std::vector<MarkerPtr> waits;
  if (found->last_launch) waits.push_back(found->last_launch);
  found->last_launch = enqueue(*on, run, waits);
  return CUDA_SUCCESS;
}

CUresult cuGraphExecDestroy(CUgraphExec exec) {
  EMULATOR_CALL(cuGraphExecDestroy, kInit);
  return state().execs.remove(exec) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
