package discovery

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
)

// TestOrder compares the order of many draws with its probabilities, by the
// chi-square test at 0.001. The draws are always the same.
func TestOrder(t *testing.T) {
	const draws = 100_000
	for _, tt := range []struct {
		weights []uint16
		want    map[string]float64 // probability of each order
		limit   float64            // maximum of chi-square, for the degrees of freedom
	}{
		{[]uint16{60, 30, 10}, map[string]float64{
			"60 30 10": .6 * 30 / 40, "60 10 30": .6 * 10 / 40, "30 60 10": .3 * 60 / 70,
			"30 10 60": .3 * 10 / 70, "10 60 30": .1 * 60 / 90, "10 30 60": .1 * 30 / 90}, 20.52},
		{[]uint16{1, 2}, map[string]float64{"1 2": 1. / 3, "2 1": 2. / 3}, 10.83},
		{[]uint16{0, 1}, map[string]float64{"0 1": .5, "1 0": .5}, 10.83},
		{[]uint16{0, 100}, map[string]float64{"0 100": 1. / 101, "100 0": 100. / 101}, 10.83},
	} {
		t.Run(fmt.Sprint(tt.weights), func(t *testing.T) {
			random := testRand()
			got := make(map[string]int)
			for range draws {
				got[order(random, tt.weights)]++
			}
			if len(got) != len(tt.want) {
				t.Fatalf("got the orders %v, want those of %v", got, tt.want)
			}
			chi := 0.0
			for o, p := range tt.want {
				d := float64(got[o]) - p*draws
				chi += d * d / (p * draws)
			}
			if chi > tt.limit {
				t.Errorf("chi-square is %.1f, want at most %.1f: %v", chi, tt.limit, got)
			}
		})
	}
}

// TestOrderOfEqualWeights checks that each record is the first equally often,
// zero weights included.
func TestOrderOfEqualWeights(t *testing.T) {
	const draws = 90_000
	for _, weight := range []uint16{0, 1, 65535} {
		t.Run(fmt.Sprint(weight), func(t *testing.T) {
			random := testRand()
			first := make(map[string]int)
			for range draws {
				records := []Record{{Target: "a"}, {Target: "b"}, {Target: "c"}}
				for i := range records {
					records[i].Weight = weight
				}
				draw(random, records)
				first[records[0].Target]++
			}
			chi := 0.0
			for _, target := range []string{"a", "b", "c"} {
				d := float64(first[target]) - draws/3
				chi += d * d / (draws / 3)
			}
			if chi > 13.82 {
				t.Errorf("chi-square is %.1f, want at most 13.82: %v", chi, first)
			}
		})
	}
}

// order draws records of the given weights and returns the weights as drawn.
func order(random *rand.Rand, weights []uint16) string {
	records := make([]Record, len(weights))
	for i, w := range weights {
		records[i].Weight = w
	}
	draw(random, records)
	var s []string
	for _, r := range records {
		s = append(s, fmt.Sprint(r.Weight))
	}
	return strings.Join(s, " ")
}

func testRand() *rand.Rand { return rand.New(rand.NewPCG(1, 2)) }
