package client

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"
	"golang.org/x/time/rate"

	"masquevpn/capsule"
	"masquevpn/internal/connectip"
	"masquevpn/internal/endpoint"
	"masquevpn/internal/flowqueue"
	"masquevpn/internal/rescue"
	"masquevpn/routing"
	"masquevpn/tun"
)

const (
	minMTU = 1280 // bytes, the least for IPv6 (RFC 8200 section 5)
	maxMTU = flowqueue.MaxSize
	// sendBatch is how many packets are taken from the queue at once: few,
	// because they are past what keeps the queue fair.
	sendBatch = 16
)

// Client keeps one tunnel. Make it with New.
type Client struct {
	cfg      Config
	target   target
	dialer   *dialer
	instance string // tells this run from others of the same user

	supervisor   endpoint.Supervisor[*localEndpoint]
	host         *host
	lastDial     dialState                  // when it dialed last
	earlyRetries *rate.Limiter              // limits retries before the backoff ends
	lastDNS      []capsule.DNSConfiguration // what the last session said of DNS
	queue        *flowqueue.Queue           // packets read from the device
	// where packets of the device go, nil while there is no session
	current   atomic.Pointer[connectip.Conn]
	stats     connectip.Stats
	reading   connectip.Busy // the device's reader has packets
	sender    connectip.Busy // packets taken from queue
	lastAddrs []netip.Prefix // addresses of the last session, to ask for again
	// the proxy ends the tunnel when it is asked for addresses, and assigns
	// some without that
	skipRequest bool
	everApplied bool           // the kernel has followed a proxy
	installed   []netip.Prefix // addresses that the kernel has of a proxy

	// what the log was told of networks that hold them
	loggedOverlap string
	networks      atomic.Pointer[[]routing.HostNetwork] // this host's networks
	// ends the notice of noteLoop, nil before the first
	loopTimer *time.Timer

	mu             sync.Mutex
	status         connectip.Status
	reconnects     [numLosses]uint64 // status.Reconnects by reason
	currentSession *session          // nil while there is none
	quicConn       *quic.Conn        // the session's connection; nil: no session

	// What the kernel has, and had to be put right in it.
	lastState         *routing.State // applied to the current end or the last; nil: nothing was
	assigned          []assigned     // addresses
	present           []netip.Prefix // addresses of the interface
	ipv6Held          bool
	repairs           map[string]uint64
	killSwitchRepairs uint64
	dnsRepairs        uint64
	dnsLost           bool // the resolver has lost what it was told

	failure *Error // why the last attempt failed; nil once one has connected
	// guards loggedOutside, and is held while conflicts with the host's routes
	// are noted
	notingMu      sync.Mutex
	loggedOutside string // what the log said last of names that are asked outside

	notices map[string]notice // key: what the notice is about
	// reason of the last StateConnected, shown again when no notice degrades
	// the tunnel
	connectedReason string

	changed chan struct{}
}

// Status describes a tunnel; its JSON form is that of `masque-client status
// --json`.
type Status = connectip.Status

// The states of a tunnel.
const (
	StateConnecting = "connecting"
	StateConnected  = "connected"
	// connected, but the host or the path does not keep what the tunnel
	// promises
	StateDegraded     = "degraded"
	StateReconnecting = "reconnecting"
	StateStopping     = "stopping"
	StateFailed       = "failed"
)

// What Status says of the kill switch.
const (
	KillSwitchOff    = "off"    // none is configured
	KillSwitchClosed = "closed" // nothing leaves but through the tunnel
	KillSwitchOpen   = "open"   // another program has opened it
)

// New checks cfg and makes a Client of it; nothing is opened or sent yet.
// Errors are *Error of KindUsage.
func New(cfg Config) (*Client, error) {
	to, err := cfg.resolveTarget()
	if err != nil {
		return nil, err
	}
	withKernel := cfg.OpenNetwork == nil
	if cfg, err = cfg.withDefaults(); err != nil {
		return nil, err
	}
	var control controlFunc
	if withKernel {
		control = routing.MarkSocket(cfg.Mark)
	}
	c := &Client{cfg: cfg, target: to, instance: cmp.Or(cfg.Instance, rand.Text()),
		queue: flowqueue.New(), changed: make(chan struct{}), notices: make(map[string]notice)}
	c.supervisor.Open, c.supervisor.Report, c.supervisor.Logger = c.openEndpoint, c.noteHealth,
		cfg.Logger
	c.host, c.earlyRetries = newHost(cfg.Suspended), rate.NewLimiter(rate.Every(earlyRetryInterval), earlyRetryBurst)
	c.dialer = newDialer(to, cfg.TLS, cfg.Token, control, cfg.Logger)
	c.dialer.congestion, c.dialer.upstream = cfg.Congestion, c.upstream
	c.dialer.resolver = resolver(control, cfg.Nameservers)
	c.dialer.tracer = cfg.Tracer
	c.dialer.dropped = func(packets int) {
		c.stats.Receive.DropMany(connectip.DropSocketFull, packets)
	}
	c.status = connectip.Status{
		Schema: connectip.StatusSchema, Name: cfg.Name, State: StateConnecting, Since: time.Now(),
		Proxy:     connectip.ProxyStatus{Name: to.host, HTTP: "h3"},
		Addresses: []netip.Prefix{}, Routes: []connectip.RouteStatus{}, KillSwitch: KillSwitchOff,
	}
	c.status.SetDNS(nil, nil)
	return c, nil
}

// Run keeps the tunnel until ctx ends, which gives nil, or until it fails for
// good, which gives an *Error. Either way the host is as it was before, but for
// a kill switch, which stays closed. It may be called once.
func (c *Client) Run(ctx context.Context) (err error) {
	defer func() {
		if err != nil {
			c.setState(StateFailed, err.Error())
		}
	}()
	if err := c.closeKillSwitch(""); err != nil {
		return err
	}
	if err := c.supervisor.Start(); err != nil {
		c.queue.Close()
		return hostError(err, "")
	}
	c.setState(StateConnecting, "")
	var sending, maintaining sync.WaitGroup
	// Joined errors lose their kind, so only a failure to restore the host is
	// added.
	defer func() {
		if closeErr := c.supervisor.Close(); closeErr != nil {
			err = errors.Join(err, closeErr)
		}
		c.queue.Close()
		sending.Wait()
	}()
	ctx, stop := context.WithCancel(ctx)
	defer maintaining.Wait()
	defer stop()
	endWatch, err := c.watchHost(ctx)
	if err != nil {
		return hostError(err, "")
	}
	defer endWatch()
	sending.Go(c.sendQueued)
	maintaining.Go(func() { c.supervisor.Run(ctx) })
	maintaining.Go(func() { c.maintainDNS(ctx) })
	if c.cfg.KillSwitch != nil {
		maintaining.Go(func() { c.maintainKillSwitch(ctx) })
	}
	err = c.runSessions(ctx)
	c.setState(StateStopping, "")
	return err
}

// closeKillSwitch closes the kill switch, if there is one, but for an
// interface, or puts it back where others removed it.
func (c *Client) closeKillSwitch(iface string) error {
	if c.cfg.KillSwitch == nil {
		return nil
	}
	if err := c.cfg.KillSwitch.Close(iface); err != nil {
		return hostError(err, "closing the kill switch: ")
	}
	c.mu.Lock()
	c.status.KillSwitch = KillSwitchClosed
	c.mu.Unlock()
	return nil
}

// privileged makes an Error of what opening something on this host gave.
func hostError(err error, what string) error {
	c := causeFailure
	if errors.Is(err, tun.ErrPermission) || errors.Is(err, os.ErrPermission) {
		c = causePrivileges
	}
	return fail(c, err, what+err.Error(), "")
}

// keepConnected has one session after another until ctx ends or trying again
// cannot help.
func (c *Client) runSessions(ctx context.Context) error {
	r := retry{enabled: c.cfg.Reconnect, service: c.cfg.Service, maxDelay: c.cfg.MaxDelay,
		logger: c.cfg.Logger}
	r.everApplied = func() bool { return c.everApplied }
	r.beforeWait = func(everConnected bool, e *Error) {
		c.mu.Lock()
		c.failure = e
		c.mu.Unlock()
		c.noteImpostor(e)
		state := StateConnecting
		if everConnected {
			state = StateReconnecting
			c.mu.Lock()
			c.status.Reconnects++
			c.reconnects[lossOf(e)]++
			c.mu.Unlock()
		}
		c.setState(state, e.statusText())
	}
	r.awaitReason = c.awaitNetworkChange
	return r.run(ctx, func(ctx context.Context) (connected time.Duration, err error) {
		defer rescue.Catch(func(e *rescue.Error) {
			c.logPanic(e)
			err = e
		})
		return c.runSession(ctx)
	})
}

// panicked logs a panic of a goroutine that serves a session, which ends with
// it.
func (c *Client) logPanic(e *rescue.Error) {
	c.cfg.Logger.Error("a fault of this program ended the session; please report it with this line",
		"panic", fmt.Sprint(e.Value), "stack", string(e.Stack))
}

// notePeer has the status warn of somebody who answers in the proxy's place,
// until the proxy has proved who it is again.
func (c *Client) noteImpostor(e *Error) {
	if text := e.impostorText(); text != "" || failures[e.cause].source == byProxy {
		c.warn(noticePeer, text)
	}
}

// dispatch queues packets, which the queue owns from then on: they are set to
// nil. A single one for an idle tunnel is sent at once.
func (c *Client) dispatch(packets []*flowqueue.Packet) {
	c.reading.Begin()
	defer c.reading.End()
	if c.dropLoops(packets) {
		return
	}
	switch conn := c.current.Load(); {
	case conn == nil:
		c.stats.Send.DropMany(connectip.DropClosed, len(packets))
	case len(packets) == 1 && c.queue.Idle() && conn.Ready():
		conn.TrySend(packets[0].Bytes(), tun.Headroom) // waking the other goroutine takes longer
	default:
		c.stats.Send.DropMany(connectip.DropQueueFull, c.queue.Push(packets))
		clear(packets)
	}
}

// sendQueued sends what is queued, until the queue is closed.
func (c *Client) sendQueued() {
	var batch [sendBatch]*flowqueue.Packet
	for {
		n, late := c.queue.Pop(batch[:])
		c.stats.Send.DropMany(connectip.DropQueueDelay, late)
		if n == 0 {
			return
		}
		conn := c.current.Load()
		c.sender.Begin()
		for _, p := range batch[:n] {
			if conn == nil {
				c.stats.Send.Drop(connectip.DropClosed)
			} else {
				conn.Send(p.Bytes(), tun.Headroom)
			}
			p.Free()
		}
		c.sender.End()
	}
}

// Changed returns a channel that is closed at the next change of state, or of
// what the proxy assigned, advertised or said about DNS.
func (c *Client) Changed() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.changed
}

func (c *Client) setState(state, reason string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.setStateLocked(state, reason)
	c.notify()
}

// setReason replaces the reason of the state, which stays.
func (c *Client) setReason(reason string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.status.Reason == reason {
		return
	}
	c.status.Reason = reason
	c.notify()
}

// Failure returns why the last attempt at a session failed, or the last session
// ended; nil before the first, and while one is connected.
func (c *Client) Failure() *Error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.failure
}

// setStateLocked is setState without a wake-up for those who wait. A tunnel
// that is connected is shown as degraded while a notice asks for that. c.mu is
// held.
func (c *Client) setStateLocked(state, reason string) {
	if state == StateConnected {
		c.failure, c.connectedReason = nil, reason
		if why := c.degradation(); why != "" {
			state, reason = StateDegraded, why
		}
	}
	if c.status.State != state {
		c.status.Since = time.Now()
	}
	c.status.State, c.status.Reason = state, reason
}

// notify wakes up those who wait for changes. c.mu is held.
func (c *Client) notify() {
	close(c.changed)
	c.changed = make(chan struct{})
}

// Status describes the tunnel as it is now.
func (c *Client) Status() Status {
	c.countOverflow()
	oldest := c.oldest()
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.status
	if c.quicConn != nil {
		s.RTT = c.quicConn.ConnectionStats().SmoothedRTT.Microseconds()
	}
	s.SetTraffic(&c.stats)
	s.OldestPacket = oldest.Milliseconds()
	return s
}
