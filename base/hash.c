/* SPDX-License-Identifier: Apache-2.0 */
#include "base/base.h"

#include <xxhash.h>

uint64_t hash64(const void *data, size_t bytes, uint64_t seed)
{
	return XXH3_64bits_withSeed(data, bytes, seed);
}

struct hash128 hash128(const void *data, size_t bytes, uint64_t seed)
{
	XXH128_hash_t h = XXH3_128bits_withSeed(data, bytes, seed);

	return (struct hash128){ .lo = h.low64, .hi = h.high64 };
}

struct hash128 hash128_add(struct hash128 a, struct hash128 b)
{
	struct hash128 sum = { .lo = a.lo + b.lo, .hi = a.hi + b.hi };

	sum.hi += sum.lo < a.lo;
	return sum;
}

void hash128_hex(struct hash128 h, char out[33])
{
	snprintf(out, 33, "%016llx%016llx", (unsigned long long)h.hi, (unsigned long long)h.lo);
}
