package config

import (
	"fmt"
	"strconv"
	"strings"
)

// Bounds of a rate, in bits per second. Below minRate a packet would take
// longer than the idle timeout of connections.
const (
	minRate = 64_000
	maxRate = 1_000_000_000_000
)

// units lists the units of rates, the largest first, in bits per second and
// powers of 1000.
var units = []struct {
	name string
	bits int64
}{{"Gbit", 1_000_000_000}, {"Mbit", 1_000_000}, {"kbit", 1000}}

// ParseRate parses a number of bits per second with its unit, as in "20Mbit",
// "2.5Gbit" or "512kbit". The unit is required to prevent confusion of bits
// with bytes.
func ParseRate(s string) (bitsPerSecond int64, err error) {
	for _, u := range units {
		number, ok := cutSuffixFold(s, u.name)
		if !ok {
			continue
		}
		n, err := strconv.ParseFloat(strings.TrimSpace(number), 64)
		if err != nil || strings.ContainsAny(number, "eExXpP_+-nN") {
			break
		}
		switch bits := n * float64(u.bits); {
		case bits < minRate:
			return 0, fmt.Errorf("less than %s", FormatRate(minRate))
		case bits > maxRate:
			return 0, fmt.Errorf("more than %s", FormatRate(maxRate))
		default:
			return int64(bits + 0.5), nil
		}
	}
	return 0, fmt.Errorf("not a number of kbit, Mbit or Gbit per second")
}

func cutSuffixFold(s, suffix string) (string, bool) {
	if n := len(s) - len(suffix); n >= 0 && strings.EqualFold(s[n:], suffix) {
		return s[:n], true
	}
	return s, false
}

// FormatRate formats bits per second for ParseRate.
func FormatRate(bitsPerSecond int64) string {
	for _, u := range units {
		if bitsPerSecond >= u.bits || u.bits == 1000 {
			return strconv.FormatFloat(float64(bitsPerSecond)/float64(u.bits), 'f', -1, 64) + u.name
		}
	}
	return ""
}

// rate returns a number of bits per second, 0 when the key is absent.
func (t *table) rate(key string) int64 {
	const remedy = `write bits per second with their unit, for example "512kbit", "20Mbit" or "1Gbit"`
	if _, ok := t.values[key].(int64); ok {
		t.get(key)
		t.add(key, "has no unit", remedy)
		return 0
	}
	s := t.string(key, "")
	if _, isString := t.values[key].(string); !isString {
		return 0
	}
	rate, err := ParseRate(s)
	if err != nil {
		t.add(key, err.Error(), remedy)
	}
	return rate
}
