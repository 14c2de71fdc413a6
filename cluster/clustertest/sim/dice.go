package sim

import (
	"hash/fnv"
	"math/rand/v2"
	"time"
)

// dice give numbers that follow from the seed and from what they are thrown for, not
// from the order in which goroutines come to throw them.
type dice uint64

// of returns dice for one purpose.
func (d dice) of(what string) dice {
	h := fnv.New64a()
	_, _ = h.Write([]byte(what)) // never fails
	return d.nth(h.Sum64())
}

// nth returns the dice of the nth throw (splitmix64).
func (d dice) nth(n uint64) dice {
	z := uint64(d) + (n+1)*0x9e3779b97f4a7c15
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return dice(z ^ z>>31)
}

// stream returns a sequence of numbers.
func (d dice) stream() *rand.Rand { return rand.New(rand.NewPCG(uint64(d), 0)) }

// chance reports whether something with probability p happens.
func (d dice) chance(p float64) bool { return float64(d>>11)/(1<<53) < p }

// upTo returns a duration in [0, max).
func (d dice) upTo(max time.Duration) time.Duration {
	if max <= 0 {
		return 0
	}
	return time.Duration(uint64(d) % uint64(max))
}

func between(r *rand.Rand, min, max time.Duration) time.Duration {
	return min + time.Duration(r.Int64N(int64(max-min)+1))
}

func pick[T any](r *rand.Rand, l []T) T { return l[r.IntN(len(l))] }
