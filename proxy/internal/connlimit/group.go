package connlimit

import (
	"container/list"
	"iter"
	"maps"
	"slices"
)

// group contains connections, oldest first, and counts them by key. The zero
// value is empty.
type group struct {
	order list.List      // elements are *Conn
	count map[string]int // number of connections by key, without zeros
}

func (g *group) len() int { return g.order.Len() }

func (g *group) add(c *Conn, key string) {
	if g.count == nil {
		g.count = make(map[string]int)
	}
	c.group, c.key, c.element = g, key, g.order.PushBack(c)
	g.count[key]++
}

// leaveGroup removes c from its group, if it is in one.
func (c *Conn) leaveGroup() {
	g := c.group
	if g == nil {
		return
	}
	g.order.Remove(c.element)
	if g.count[c.key]--; g.count[c.key] == 0 {
		delete(g.count, c.key)
	}
	c.group, c.element = nil, nil
}

// oldest returns the oldest connection of key. There must be one.
func (g *group) oldest(key string) *Conn {
	for c := range g.all() {
		if c.key == key {
			return c
		}
	}
	return nil
}

// oldestOfLargest returns the oldest connection of the keys with the most
// connections, so that a key with many does not displace others. The group must
// not be empty.
func (g *group) oldestOfLargest() *Conn {
	largest := slices.Max(slices.Collect(maps.Values(g.count)))
	for c := range g.all() {
		if g.count[c.key] == largest {
			return c
		}
	}
	return nil
}

// all yields all connections, oldest first. The caller may remove a yielded
// connection.
func (g *group) all() iter.Seq[*Conn] {
	return func(yield func(*Conn) bool) {
		for e := g.order.Front(); e != nil; {
			next := e.Next()
			if !yield(e.Value.(*Conn)) {
				return
			}
			e = next
		}
	}
}
