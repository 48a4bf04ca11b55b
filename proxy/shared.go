package proxy

import (
	"sync/atomic"

	"masquevpn/internal/connectip"
	"masquevpn/proxy/internal/addrpool"
)

// shared is the part of a Server that its sessions use.
type shared struct {
	config atomic.Pointer[Config] // never nil; read it with cfg
	dns    atomic.Pointer[DNS]    // never nil

	templates templates
	pool      *addrpool.Pool
	table     *table
	sites     *sites
	access    *access
	peers     *peers
	names     nameResolver

	// device writes to the current device. deviceName returns its name.
	device     connectip.Device
	deviceName func() string
}

// cfg returns the present configuration, which callers must not change.
func (s *shared) cfg() *Config { return s.config.Load() }
