package main

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"masquevpn/client"
	"masquevpn/internal/lab"
)

// Addresses inside every tunnel.
var (
	insidePool = netip.MustParsePrefix("10.77.0.0/16")
	proxyAddr  = netip.MustParseAddr("10.77.0.1")
	clientAddr = netip.MustParseAddr("10.77.0.2")
)

const (
	patience = 20 * time.Second      // limits waits that usually take a second or two
	poll     = 10 * time.Millisecond // interval of checks for an expected event
	settle   = time.Second           // delay between start and first measurement
)

// kind describes one kind of tunnel.
type kind struct {
	name  string
	ours  bool
	bin   string // directory of masquevpn's programs
	iface string // device name on both ends
	proxy func(context.Context, *tunnel) error
	// client starts the client. Packets may take a moment longer to flow.
	client func(context.Context, *tunnel) error
}

// kinds returns the tunnels to compare, masquevpn first.
func kinds(bins []string) []kind {
	var all []kind
	for i, dir := range bins {
		name := "masquevpn"
		if i > 0 {
			name += "-" + strconv.Itoa(i+1)
		}
		all = append(all, kind{name: name, ours: true, bin: dir, iface: "masque0",
			proxy: startOurProxy, client: startOurClient})
	}
	return append(all,
		kind{name: wireguardName, iface: "wg0", proxy: startWireguardProxy,
			client: startWireguardClient},
		kind{name: plainName, iface: "plain0", proxy: startPlainProxy, client: startPlainClient})
}

// Names of the other tunnels.
const (
	wireguardName = "wireguard-go"
	plainName     = "connect-ip-go"
)

// tunnel is a tunnel between two hosts of a lab.
type tunnel struct {
	kind
	*lab.Topology
	dir           string              // directory for the tunnel's files
	client, proxy *lab.Cmd            // processes of the two ends
	servers       int                 // number of iperf3 servers started so far
	capacity      map[udpLoad]float64 // packets per second, see udpCapacity
	clientKey     *ecdh.PrivateKey    // wireguard-go only
	proxyKey      *ecdh.PrivateKey
}

// open makes the hosts for a tunnel, with path between the client and the
// router. nil: a link without impairment.
func (k kind) open(ctx context.Context, dir string, path *lab.Impairment) (*tunnel, error) {
	l, err := lab.New(ctx)
	if err != nil {
		return nil, err
	}
	t := &tunnel{kind: k, capacity: make(map[udpLoad]float64)}
	if t.dir, err = os.MkdirTemp(dir, ""); err == nil {
		t.Topology, err = lab.NewTopology(l,
			lab.TopologyOptions{Pool: []netip.Prefix{insidePool}, Impair: path, Seed: 1})
	}
	if err == nil {
		err = t.Proxy.Forward()
	}
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return t, nil
}

// start starts both ends, and waits until a ping gets through and the ends have
// discovered the path MTU.
func (t *tunnel) start(ctx context.Context) error {
	if err := t.kind.proxy(ctx, t); err != nil {
		return err
	}
	if err := t.kind.client(ctx, t); err != nil {
		return err
	}
	pctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if _, err := t.Client.Ping(pctx, lab.TargetIPv4); err != nil {
		return fmt.Errorf("no ping gets through: %w\n%s%s", err, logOf(t.client), logOf(t.proxy))
	}
	return sleep(ctx, settle)
}

func logOf(c *lab.Cmd) string {
	text, err := c.Log()
	if err != nil {
		return err.Error()
	}
	return text
}

// launch starts a program that keeps running.
func launch(ctx context.Context, h *lab.Host, name string, args ...string) (*lab.Cmd, error) {
	c := h.Command(ctx, name, args...)
	return c, c.Start()
}

// output runs a program that must succeed, and returns its standard output.
func output(ctx context.Context, h *lab.Host, name string, args ...string) ([]byte, error) {
	c := h.Command(ctx, name, args...)
	out, err := c.Output()
	if err != nil {
		return nil, fmt.Errorf("%w\n%s%s", err, out, logOf(c))
	}
	return out, nil
}

// until waits until ok returns true, while c runs.
func until(ctx context.Context, c *lab.Cmd, ok func() bool) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for !ok() {
		select {
		case <-c.Done():
			return fmt.Errorf("%s ended: %w\n%s", c, c.Wait(), logOf(c))
		case <-ctx.Done():
			return fmt.Errorf("%s: not ready in %v\n%s", c, patience, logOf(c))
		case <-time.After(poll):
		}
	}
	return nil
}

// Ours.

func startOurProxy(ctx context.Context, t *tunnel) error {
	dir := filepath.Join(t.dir, "proxy")
	program := filepath.Join(t.bin, "masque-proxy")
	config := filepath.Join(dir, "proxy.toml")
	if _, err := output(ctx, t.Proxy, program, "init", "--name", lab.ProxyName, dir); err != nil {
		return err
	}
	err := os.WriteFile(config, fmt.Appendf(nil, `
name = %q
[tls]
cert = "proxy.crt"
key = "proxy.key"
client_ca = "ca.crt"
[auth]
methods = ["mtls", "token"]
users = "users.toml"
[pool]
ipv4 = %q
[routes]
advertise = ["192.0.2.0/24"]
[nat]
masquerade = false
[limits]
sessions = 100000
sessions_per_user = 100000
`, lab.ProxyName, insidePool), 0o600)
	if err != nil {
		return err
	}
	file := t.clientFile()
	if _, err := output(ctx, t.Proxy, program, "invite", "bench", "-c", config, "-o",
		file); err != nil {
		return err
	}
	if t.proxy, err = launch(ctx, t.Proxy, program, "run", "-c", config); err != nil {
		return err
	}
	return until(ctx, t.proxy, func() bool {
		return t.Proxy.Command(ctx, program, "status", "--json").Run() == nil
	})
}

func (t *tunnel) clientFile() string { return filepath.Join(t.dir, "bench.toml") }

func startOurClient(ctx context.Context, t *tunnel) (err error) {
	t.client, err = launch(ctx, t.Client, filepath.Join(t.bin, "masque-client"), "run", "-c",
		t.clientFile())
	return err
}

// status returns the status of the client, and of the proxy's only session.
func (t *tunnel) status(ctx context.Context) (c, p client.Status, err error) {
	out, err := output(ctx, t.Client, filepath.Join(t.bin, "masque-client"), "status", "bench",
		"--json")
	if err != nil {
		return c, p, err
	}
	if err := json.Unmarshal(out, &c); err != nil {
		return c, p, err
	}
	out, err = output(ctx, t.Proxy, filepath.Join(t.bin, "masque-proxy"), "sessions", "--json")
	if err != nil {
		return c, p, err
	}
	var sessions []client.Status
	if err := json.Unmarshal(out, &sessions); err != nil {
		return c, p, err
	}
	if len(sessions) != 1 {
		return c, p, fmt.Errorf("%d sessions, want 1", len(sessions))
	}
	return c, sessions[0], nil
}

// wireguard-go.

// wireguardMTU is the MTU for outer packets of 1500 bytes.
const wireguardMTU = 1420

func startWireguardProxy(ctx context.Context, t *tunnel) (err error) {
	for _, key := range []**ecdh.PrivateKey{&t.clientKey, &t.proxyKey} {
		if *key, err = ecdh.X25519().GenerateKey(rand.Reader); err != nil {
			return err
		}
	}
	t.proxy, err = startWireguard(ctx, t, t.Proxy,
		fmt.Sprintf("private_key=%x\nlisten_port=51820\npublic_key=%x\nallowed_ip=%s/32\n",
			t.proxyKey.Bytes(), t.clientKey.PublicKey().Bytes(), clientAddr))
	if err != nil {
		return err
	}
	return t.configure(ctx, t.Proxy, wireguardMTU, proxyAddr, insidePool)
}

func startWireguardClient(ctx context.Context, t *tunnel) (err error) {
	t.client, err = startWireguard(ctx, t, t.Client,
		fmt.Sprintf("private_key=%x\npublic_key=%x\nendpoint=%s\nallowed_ip=192.0.2.0/24\n",
			t.clientKey.Bytes(), t.proxyKey.PublicKey().Bytes(),
			netip.AddrPortFrom(lab.ProxyIPv4, 51820)))
	if err != nil {
		return err
	}
	return t.configure(ctx, t.Client, wireguardMTU, clientAddr,
		netip.MustParsePrefix("192.0.2.0/24"))
}

// startWireguard starts one end and configures it
// (https://www.wireguard.com/xplatform/).
func startWireguard(ctx context.Context, t *tunnel, h *lab.Host, config string) (*lab.Cmd, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	c := h.Command(ctx, filepath.Join(filepath.Dir(self), "wireguard"), "-f", t.iface)
	c.Env = append(os.Environ(), "LOG_LEVEL=error")
	if err := c.Start(); err != nil {
		return nil, err
	}
	var conn net.Conn
	err = until(ctx, c, func() bool {
		err := h.Do(func() (err error) {
			conn, err = net.Dial("unix", "/var/run/wireguard/"+t.iface+".sock")
			return err
		})
		return err == nil
	})
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "set=1\n"+config+"\n"); err != nil {
		return nil, err
	}
	answer := make([]byte, 64)
	n, err := conn.Read(answer)
	if err != nil || !strings.HasPrefix(string(answer[:n]), "errno=0\n") {
		return nil, fmt.Errorf("wireguard-go does not take its configuration: %q, %w",
			answer[:n], err)
	}
	return c, nil
}

// configure adds an address and a route to a tunnel's device.
func (t *tunnel) configure(ctx context.Context, h *lab.Host, mtu int, addr netip.Addr,
	route netip.Prefix) error {
	script := fmt.Sprintf("addr add %s/32 dev %[2]s\nlink set %[2]s mtu %d up\nroute add %s dev %[2]s src %[1]s\n", addr, t.iface, mtu, route)
	c := h.Command(ctx, "ip", "-batch", "-")
	c.Stdin = strings.NewReader(script)
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// connect-ip-go with water.

func startPlainProxy(ctx context.Context, t *tunnel) (err error) {
	if t.proxy, err = t.startPlain(ctx, t.Proxy, "plain-proxy"); err != nil {
		return err
	}
	return t.configure(ctx, t.Proxy, plainMTU, proxyAddr, insidePool)
}

func startPlainClient(ctx context.Context, t *tunnel) (err error) {
	if t.client, err = t.startPlain(ctx, t.Client, "plain-client"); err != nil {
		return err
	}
	return t.configure(ctx, t.Client, plainMTU, clientAddr, netip.MustParsePrefix("192.0.2.0/24"))
}

// startPlain starts one end of the reference, which is part of this program,
// and waits for its device.
func (t *tunnel) startPlain(ctx context.Context, h *lab.Host, role string) (*lab.Cmd, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	c, err := launch(ctx, h, self, role, t.iface, t.dir)
	if err != nil {
		return nil, err
	}
	return c, until(ctx, c, func() bool {
		return h.Do(func() error {
			_, err := net.InterfaceByName(t.iface)
			return err
		}) == nil
	})
}

// describe returns the version that a program prints.
func describe(ctx context.Context, program string, args ...string) string {
	out, err := exec.CommandContext(ctx, program, args...).Output()
	if err != nil {
		return err.Error()
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return line
}
