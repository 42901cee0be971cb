/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <string.h>

#include <gmem/policies.h>
#include <gmem/policy.h>
#include <gmem/sparse.h>

/* The first one is the default: docs/maintainer.md has the figures that chose it. */
static const struct gmem_policy_ops *const policies[] = {
	&gmem_policy_acme, &gmem_policy_s3fifo, &gmem_policy_sieve,
	&gmem_policy_clock, &gmem_policy_lfu, &gmem_policy_lru,
};
#define POLICIES (sizeof(policies) / sizeof(*policies))

const struct gmem_policy_ops *gmem_policy_find(const char *name)
{
	if (!name)
		return policies[0];
	for (size_t i = 0; i < POLICIES; i++)
		if (!strcmp(policies[i]->name, name))
			return policies[i];
	return NULL;
}

const char *gmem_policy_name(size_t index)
{
	return index < POLICIES ? policies[index]->name : NULL;
}

static uint64_t node_bytes(const struct gmem_policy *policy)
{
	return ((uint64_t)policy->frames + GMEM_POLICY_SPARE) * sizeof(*policy->nodes);
}

int gmem_policy_init(struct gmem_policy *policy, const struct gmem_policy_ops *ops, uint32_t frames)
{
	int err = 0;

	*policy = (struct gmem_policy){ .ops = ops, .frames = frames };
	policy->nodes = gmem_sparse_map(node_bytes(policy));
	if (!policy->nodes)
		return -ENOMEM;
	if (ops->ghosts)
		err = gmem_ghosts_init(&policy->ghosts, frames);
	if (!err && ops->init)
		err = ops->init(policy);
	if (err)
		gmem_policy_deinit(policy);
	return err;
}

void gmem_policy_deinit(struct gmem_policy *policy)
{
	if (policy->ops && policy->ops->deinit)
		policy->ops->deinit(policy);
	gmem_sparse_unmap(policy->nodes, node_bytes(policy));
	gmem_ghosts_deinit(&policy->ghosts);
	policy->nodes = NULL;
}

void gmem_queue_push_head(struct gmem_policy *policy, int queue, uint32_t frame)
{
	struct gmem_queue *q = &policy->queues[queue];
	struct gmem_node *nodes = policy->nodes;

	nodes[frame].queue = (uint8_t)queue;
	nodes[frame].prev = GMEM_FRAME_NONE;
	nodes[frame].next = q->head;
	if (q->head)
		nodes[q->head].prev = frame;
	else
		q->tail = frame;
	q->head = frame;
	q->count++;
}

void gmem_queue_push_tail(struct gmem_policy *policy, int queue, uint32_t frame)
{
	struct gmem_queue *q = &policy->queues[queue];
	struct gmem_node *nodes = policy->nodes;

	nodes[frame].queue = (uint8_t)queue;
	nodes[frame].next = GMEM_FRAME_NONE;
	nodes[frame].prev = q->tail;
	if (q->tail)
		nodes[q->tail].next = frame;
	else
		q->head = frame;
	q->tail = frame;
	q->count++;
}

void gmem_queue_unlink(struct gmem_policy *policy, uint32_t frame)
{
	struct gmem_node *nodes = policy->nodes, *node = &nodes[frame];
	struct gmem_queue *q = &policy->queues[node->queue];

	if (node->prev)
		nodes[node->prev].next = node->next;
	else
		q->head = node->next;
	if (node->next)
		nodes[node->next].prev = node->prev;
	else
		q->tail = node->prev;
	q->count--;
	q->offered = 0;
}

uint32_t gmem_queue_offer(struct gmem_policy *policy, int queue)
{
	uint32_t frame = policy->queues[queue].tail, offered = policy->queues[queue].offered;

	gmem_queue_unlink(policy, frame);
	gmem_queue_push_head(policy, queue, frame);
	policy->queues[queue].offered = offered + 1;
	return frame;
}

int gmem_queue_pick(struct gmem_policy *policy, int wanted, int other)
{
	struct gmem_queue *q = policy->queues;

	if (q[wanted].offered < q[wanted].count)
		return wanted;
	if (q[other].offered < q[other].count)
		return other;
	q[wanted].offered = q[other].offered = 0; /* a whole round: once more */
	return q[wanted].count ? wanted : other;
}
