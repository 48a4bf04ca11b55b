package discovery

import (
	"math/rand/v2"
	"slices"
)

// draw puts records of one priority in the order in which to try them: at
// random, by their weights (RFC 2782). A record of weight 0 beside others is
// drawn as if the weights were shares of the sum plus one.
func draw(random *rand.Rand, records []Record) {
	random.Shuffle(len(records), func(i, k int) { records[i], records[k] = records[k], records[i] })
	slices.SortStableFunc(records, func(a, b Record) int {
		return min(int(a.Weight), 1) - min(int(b.Weight), 1)
	})
	for rest := records; len(rest) > 1; rest = rest[1:] {
		i := pick(random, rest)
		chosen := rest[i]
		copy(rest[1:i+1], rest[:i])
		rest[0] = chosen
	}
}

// pick draws the index of one of records, of which those of weight 0 are the
// first.
func pick(random *rand.Rand, records []Record) int {
	sum := 0
	for _, r := range records {
		sum += int(r.Weight)
	}
	r := 0
	if records[0].Weight == 0 {
		r = random.IntN(sum + 1)
	} else {
		r = 1 + random.IntN(sum)
	}
	for i := range records {
		if r -= int(records[i].Weight); r <= 0 {
			return i
		}
	}
	return len(records) - 1
}
