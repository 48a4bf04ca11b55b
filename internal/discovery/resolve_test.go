package discovery_test

import (
	"testing"
	"time"

	"masquevpn/internal/discovery/discoverytest"
)

// TestVectors resolves the cases of testdata in their worlds.
func TestVectors(t *testing.T) {
	for _, v := range discoverytest.Vectors(t) {
		t.Run(v.Name, func(t *testing.T) {
			if v.Sequence == nil {
				v.World.Now = discoverytest.Epoch
				discoverytest.Check(t, v.Expect,
					discoverytest.Outcome(t.Context(), &v, v.World.Resolver()))
				return
			}
			w := &discoverytest.World{}
			r := w.Resolver()
			for _, s := range v.Sequence {
				w.Become(s.World, time.Duration(s.At)*time.Second)
				discoverytest.Check(t, s.Expect, discoverytest.Outcome(t.Context(), &v, r))
			}
		})
	}
}
