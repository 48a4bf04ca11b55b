package proxy

import (
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"masquevpn/routing"
	"masquevpn/routing/routingtest"
	"masquevpn/tun/tuntest"
)

// TestDeletedDevice checks that a device that another program deletes is opened
// again with the same configuration, and that sessions continue.
func TestDeletedDevice(t *testing.T) {
	var mu sync.Mutex
	var devices []*tuntest.Device
	var kernels []*routingtest.Network
	x := newReloadable(t, func(c *Config) {
		c.OpenDevice = func() (Device, error) {
			mu.Lock()
			defer mu.Unlock()
			d := tuntest.New(1400)
			devices = append(devices, d)
			return d, nil
		}
		c.OpenNetwork = func(Device) (Network, error) {
			mu.Lock()
			defer mu.Unlock()
			k := &routingtest.Network{Lost: make(chan error, 1)}
			kernels = append(kernels, k)
			return k, nil
		}
	})
	x.device = devices[0]
	x.passes("192.0.2.1", 1)
	before := kernels[0].Last()
	kernels[0].Lost <- routing.ErrInterfaceGone
	deadline := time.Now().Add(10 * time.Second)
	for ; x.Status().KernelRepairs["device"] == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the device was not replaced: %+v", x.Status())
		}
	}
	mu.Lock()
	defer mu.Unlock()
	if got := kernels[1].States()[0]; !reflect.DeepEqual(got, before) {
		t.Errorf("applied %+v, want %+v", got, before)
	}
	x.device = devices[1]
	x.passes("192.0.2.1", 2)
	if n := len(x.Sessions()); n != 1 {
		t.Errorf("%d sessions", n)
	}
}

// TestLostKernelSide checks that problems of the configuration in the kernel
// are in the status, and that Reload applies an unchanged configuration again.
func TestLostKernelSide(t *testing.T) {
	k := &routingtest.Network{Health: make(chan routing.Health)}
	x := newReloadable(t, func(c *Config) {
		c.OpenNetwork = func(Device) (Network, error) { return k, nil }
	})
	if s := x.Status(); s.State != StateRunning || len(s.Warnings) != 0 {
		t.Errorf("at the start: %+v", s)
	}
	for range 2 { // the second is received after the first took effect
		k.Health <- routing.Health{Problem: "another program turns forwarding off",
			Repairs: map[string]uint64{"sysctl": 7}}
	}
	if s := x.Status(); s.State != StateDegraded ||
		strings.Join(s.Warnings, "") != "another program turns forwarding off" ||
		s.KernelRepairs["sysctl"] != 7 {
		t.Errorf("with a problem: %+v", s)
	}
	applied := len(k.States())
	x.reload()
	if n := len(k.States()); n != applied+1 {
		t.Errorf("Reload applied the configuration %d times, want once", n-applied)
	}
	for range 2 {
		k.Health <- routing.Health{}
	}
	if s := x.Status(); s.State != StateRunning || len(s.Warnings) != 0 {
		t.Errorf("without a problem: %+v", s)
	}
}
