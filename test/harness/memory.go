package harness

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
)

const (
	memoryChunk   = 1 << 20
	memoryOverlap = 4096 // longer than any pattern
	pageSize      = 4096
)

// Memory looks through everything that the process can read in its own memory:
// more than a core dump has, since what is marked to be left out of one
// (MADV_DONTDUMP) is read here too. The process is stopped meanwhile. A page that
// the kernel does not give out (a device's, the vvar page) is passed over; that
// one which holds data is not is an error.
func (s *Scanner) Memory(ctx context.Context, p Process) (found []Finding, n Scanned, err error) {
	if err := p.Pause(ctx); err != nil {
		return nil, n, err
	}
	defer func() { err = errors.Join(err, p.Resume()) }()
	ranges, err := readable(p.PID)
	if err != nil {
		return nil, n, err
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", p.PID))
	if err != nil {
		return nil, n, fmt.Errorf("read the memory of %s: %w", p.Name, err)
	}
	defer mem.Close()
	for _, r := range ranges {
		f, size, err := s.mapping(mem, p, r)
		if err != nil {
			return found, n, err
		}
		found = append(found, f...)
		n.Bytes += size
		n.Files++
	}
	return found, n, nil
}

// memoryRange is a mapping of a process as in proc(5).
type memoryRange struct {
	from, to int64
	what     string // path, [heap], [stack], or nothing for anonymous memory
}

// readable lists the mappings that the process itself may read.
func readable(pid int) ([]memoryRange, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var out []memoryRange
	for l := bufio.NewScanner(f); l.Scan(); {
		fields := strings.Fields(l.Text())
		var r memoryRange
		if len(fields) < 5 {
			return nil, fmt.Errorf("/proc/%d/maps is not understood", pid)
		}
		if fields[1][0] != 'r' {
			continue
		}
		if len(fields) > 5 {
			r.what = strings.Join(fields[5:], " ")
		}
		switch r.what {
		case "[vvar]", "[vvar_vclock]", "[vsyscall]": // the kernel's own
			continue
		}
		if _, err := fmt.Sscanf(fields[0], "%x-%x", &r.from, &r.to); err != nil {
			return nil, fmt.Errorf("/proc/%d/maps is not understood: %w", pid, err)
		}
		out = append(out, r)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("process %d shows no memory", pid)
	}
	return out, nil
}

// mapping looks through one mapping, in pieces that overlap.
func (s *Scanner) mapping(mem *os.File, p Process, r memoryRange) ([]Finding, int64, error) {
	name := fmt.Sprintf("the memory of %s at %#x (%s)", p.Name, r.from, orAnonymous(r.what))
	var found []Finding
	var size int64
	buf := make([]byte, memoryOverlap+memoryChunk)
	kept := 0 // bytes of the piece before, at the start of buf
	for at := r.from; at < r.to; {
		want := min(memoryChunk, r.to-at)
		got, err := mem.ReadAt(buf[kept:kept+int(want)], at)
		if err != nil && !errors.Is(err, io.EOF) && !refusedPage(err) {
			return found, size, fmt.Errorf("%s: %w", name, err)
		}
		for _, f := range s.Bytes(name, buf[:kept+got]) {
			if f.Offset += int(at-r.from) - kept; len(found) == 0 || found[len(found)-1].Offset < f.Offset || found[len(found)-1].What != f.What {
				found = append(found, f)
			}
		}
		size += int64(got)
		at += int64(got)
		if int64(got) < want { // pass over one page that is not given out
			at = (at/pageSize + 1) * pageSize
			kept = 0
			continue
		}
		keep := min(memoryOverlap, kept+got)
		copy(buf, bytes.Clone(buf[kept+got-keep:kept+got]))
		kept = keep
	}
	return found, size, nil
}

func refusedPage(err error) bool {
	return errors.Is(err, syscall.EIO) || errors.Is(err, syscall.EFAULT)
}

func orAnonymous(what string) string {
	if what == "" {
		return "anonymous"
	}
	return what
}
